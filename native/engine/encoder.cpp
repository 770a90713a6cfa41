#include "engine/encoder.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "engine/embedding.hpp"

namespace gossamer {
namespace {

constexpr int kAttentionTokens = 24;  // whose queries read a head's keys and values together

constexpr const char* kPoolings[] = {"mean", "max", "cls"};

}  // namespace

Pooling parse_pooling(const std::string& name) {
    const auto found = std::find(std::begin(kPoolings), std::end(kPoolings), name);
    if (found == std::end(kPoolings))
        throw ConfigError("found the pooling '" + name + "'; expected mean, max or cls");
    return Pooling(found - std::begin(kPoolings));
}

Encoder::Encoder(const Packed& packed, EncoderConfig config, ThreadPool& pool)
    : config_(std::move(config)),
      pool_(pool),
      kernels_(find_vector(isa())),
      attention_(find_attention(Values::f32, isa())),
      weights_(read_weights(packed, config_, pool)),
      hidden_stride_(round_up(std::size_t(config_.hidden_size), kPanelRows)),
      heads_stride_(round_up(std::size_t(config_.num_heads) * std::size_t(config_.head_dim), kPanelRows)),
      inner_stride_(round_up(std::size_t(config_.intermediate_size), kPanelRows)),
      linears_(int(std::max({hidden_stride_, heads_stride_, inner_stride_})), pool),
      angles_(config_.ropes.size()),
      inner_(Linears::kMaxTokens * inner_stride_ * sizeof(float)),
      up_(config_.gated ? Linears::kMaxTokens * inner_stride_ * sizeof(float) : 0),
      product_(Linears::kMaxTokens * hidden_stride_ * sizeof(float)),
      attention_scratch_(std::size_t(pool.size()) *
                         attention_scratch_floats(kAttentionTokens, config_.head_dim) * sizeof(float)),
      rows_(std::size_t(pool.size()) * hidden_stride_ * sizeof(float)) {
    for (int i = 0; i < pool.size(); ++i)
        keys_values_.emplace_back(KvLayout{Values::f32, config_.head_dim}, 1, 1, config_.max_length());
    reserve(kPassTokens, 1);
}

// Makes room for a pass of so many tokens, and texts of up to this length.
void Encoder::reserve(int num_tokens, int length) {
    if (num_tokens > num_rows_) {
        const std::size_t rows = std::size_t(std::max(num_tokens, pool_.size())) * sizeof(float);
        const std::size_t hidden = rows * hidden_stride_, heads = rows * heads_stride_;
        num_rows_ = 0;
        buffers_.reset();
        buffers_.reset(
            new Buffers{Scratch(hidden), Scratch(heads), Scratch(heads), Scratch(heads), Scratch(heads)});
        num_rows_ = num_tokens;
    }
    for (KvCache& cache : keys_values_) cache.reserve(length);
    const std::size_t E = std::size_t(config_.head_dim);
    for (std::size_t i = 0; i < angles_.size(); ++i) {
        const auto& [frequencies, scale] = config_.ropes[i];
        for (std::size_t p = angles_[i].size() / E; p < std::size_t(length); ++p) {
            for (const auto function : {static_cast<double (*)(double)>(std::cos), std::sin}) {
                for (const float frequency : frequencies)
                    angles_[i].push_back(float(function(double(float(p) * frequency))) * scale);
            }
        }
    }
}

void Encoder::hidden_states(const Texts& texts, float* h_TD) {
    const std::size_t D = std::size_t(config_.hidden_size);
    run(texts, [&](const Pass& pass, int thread) {
        const Part part(pass.num_tokens, thread, pool_.size());
        for (int t = part.begin; t < part.end; ++t) {
            const float* h_D = hidden(t, pass.num_tokens, thread);
            std::copy(h_D, h_D + D, h_TD + (pass.first_token + std::size_t(t)) * D);
        }
    });
}

void Encoder::encode(const Texts& texts, Pooling pooling, float* vectors_ND) {
    run(texts, [&](const Pass& pass, int thread) {
        for (std::size_t i = 0; i < pass.texts.size(); ++i) {
            float* vector_D = vectors_ND + (pass.first_text + i) * std::size_t(config_.hidden_size);
            pool_text(pass, pass.texts[i], pooling, thread, vector_D);
        }
    });
}

// Passes of whole texts; finish(pass, thread) sees the hidden states of each.
template <class Finish>
void Encoder::run(const Texts& texts, Finish finish) {
    Pass pass{};
    const auto flush = [&] {
        int longest = 0;
        for (const Text& text : pass.texts) longest = std::max(longest, text.length);
        reserve(pass.num_tokens, longest);
        pass.shares.clear();
        for (const EncoderBlock& block : weights_.blocks) {
            if (!pass.shares.contains(block.window)) pass.shares[block.window] = split(pass, block.window);
        }
        pool_.run([&](int thread) {
            embed(texts, pass, thread);
            for (const EncoderBlock& block : weights_.blocks) run_block(block, pass, thread);
            if (weights_.final_norm.weight != nullptr) {
                linears_.for_tokens(pass.num_tokens, thread, [&](int t) {
                    float* h_D = hidden(t, pass.num_tokens, thread);
                    normalize(weights_.final_norm, h_D, h_D);
                });
            }
            finish(pass, thread);
        });
        pass.first_text += pass.texts.size();
        pass.first_token += std::size_t(pass.num_tokens);
        pass.num_tokens = 0;
        pass.texts.clear();
    };
    for (const int length : texts.lengths) {
        if (pass.num_tokens > 0 && pass.num_tokens + length > kPassTokens) flush();
        pass.texts.push_back({pass.num_tokens, length});
        pass.num_tokens += length;
    }
    if (pass.num_tokens > 0) flush();
}

// Gives every thread consecutive heads of texts with about as many products of a query and a key as any
// other's.
std::vector<int> Encoder::split(const Pass& pass, int window) const {
    const int heads = config_.num_heads, threads = pool_.size();
    const auto cost = [&](const Text& text) {
        return std::int64_t(text.length) * std::min(text.length, window);
    };
    std::int64_t total = 0, before = 0;
    for (const Text& text : pass.texts) total += heads * cost(text);
    std::vector<int> shares(std::size_t(threads) + 1, int(pass.texts.size()) * heads);
    shares[0] = 0;
    for (int i = 0, thread = 0; i < int(pass.texts.size()) * heads; ++i) {
        const std::int64_t mine = cost(pass.texts[std::size_t(i / heads)]);
        const int owner = std::min(int((before + mine / 2) * threads / total), threads - 1);
        while (thread < owner) shares[std::size_t(++thread)] = i;
        before += mine;
    }
    return shares;
}

// Calls work(first, count) for slices of about the same size; one of a single token is all that there is.
template <class Work>
void Encoder::for_slices(int num_tokens, Work work) {
    const int slices = (num_tokens + Linears::kMaxTokens - 1) / Linears::kMaxTokens;
    for (int i = 0; i < slices; ++i) {
        const Part slice(num_tokens, i, slices);
        work(slice.begin, slice.end - slice.begin);
    }
}

void Encoder::embed(const Texts& texts, const Pass& pass, int thread) {
    const std::size_t D = std::size_t(config_.hidden_size);
    std::vector<std::size_t> positions;  // of each token
    for (const Text& text : pass.texts) {
        for (int p = 0; p < text.length; ++p) positions.push_back(std::size_t(config_.first_position + p));
    }
    linears_.for_tokens(pass.num_tokens, thread, [&](int t) {
        const std::size_t token = pass.first_token + std::size_t(t);
        float* h_D = hidden(t, pass.num_tokens, thread);
        look_up(weights_.embedding, texts.ids[token], h_D);
        const auto add = [&](const float* table, std::size_t row) {
            for (std::size_t d = 0; table != nullptr && d < D; ++d) h_D[d] += table[row * D + d];
        };
        add(weights_.types, std::size_t(texts.types[token]));
        add(weights_.positions, positions[std::size_t(t)]);
        normalize(weights_.norm, h_D, h_D);
    });
}

void Encoder::run_block(const EncoderBlock& block, const Pass& pass, int thread) {
    const int T = pass.num_tokens, AE = config_.num_heads * config_.head_dim;
    for_slices(T, [&](int first, int count) {
        linears_.for_tokens(count, thread, [&](int t) {
            prepare(block.qkv, block.first, hidden(first + t, T, thread), t, count, thread);
        });
        const std::size_t row = std::size_t(first) * heads_stride_;
        const auto at = [&](const Scratch& buffer) { return buffer.floats() + row; };
        linears_.multiply(block.qkv, count, {at(buffers_->q), at(buffers_->k), at(buffers_->v)}, thread);
        pool_.barrier();
    });
    attend(block, pass, thread);
    pool_.barrier();
    for_slices(T, [&](int first, int count) {
        linears_.for_tokens(count, thread, [&](int t) {
            const float* x = buffers_->attended.floats() + std::size_t(first + t) * heads_stride_;
            linears_.prepare(block.o, x, kernels_.largest(x, AE), t, count, thread);
        });
        linears_.multiply(block.o, count, {product_.floats()}, thread);
        pool_.barrier();
        linears_.for_tokens(count, thread, [&](int t) {
            float* h_D = hidden(first + t, T, thread);
            add_product(t, h_D);
            prepare(block.inner, block.middle, h_D, t, count, thread);
        });
        linears_.multiply(block.inner, count, {inner_.floats(), up_.floats()}, thread);
        linears_.activate(block.inner, count, thread, [&](int t, int begin, int end) {
            const std::size_t row = std::size_t(t) * inner_stride_ + std::size_t(begin);
            float* x = inner_.floats() + row;
            return config_.gated ? kernels_.geglu(x, up_.floats() + row, end - begin, x)
                                 : kernels_.gelu(x, end - begin, x);
        });
        pool_.barrier();
        linears_.for_tokens(count, thread, [&](int t) {
            const float* x = inner_.floats() + std::size_t(t) * inner_stride_;
            linears_.prepare(block.down, x, linears_.largest(t), t, count, thread);
        });
        linears_.multiply(block.down, count, {product_.floats()}, thread);
        pool_.barrier();
        linears_.for_tokens(count, thread, [&](int t) {
            float* h_D = hidden(first + t, T, thread);
            add_product(t, h_D);
            if (block.last.weight != nullptr) normalize(block.last, h_D, h_D);
        });
    });
}

// h += product of one token, whose product is in `row`.
void Encoder::add_product(int row, float* h_D) const {
    const float* y_D = product_.floats() + std::size_t(row) * hidden_stride_;
    for (int d = 0; d < config_.hidden_size; ++d) h_D[d] += y_D[d];
}

// y = LayerNorm(x), which may be in the same place; returns the largest magnitude.
float Encoder::normalize(const LayerNorm& norm, const float* x_D, float* y_D) const {
    return kernels_.layernorm(x_D, norm.weight, norm.bias, config_.norm_eps, config_.hidden_size, y_D);
}

// A token's hidden states as the input of a group: normalized, where there is a norm. They remain what they
// are where norms come first.
void Encoder::prepare(const Group& group, const LayerNorm& norm, float* h_D, int token, int count,
                      int thread) {
    float *x_D = h_D, largest;
    if (norm.weight == nullptr) {
        largest = kernels_.largest(h_D, config_.hidden_size);
    } else {
        if (config_.norm_first) x_D = rows_.floats() + std::size_t(thread) * hidden_stride_;
        largest = normalize(norm, h_D, x_D);
    }
    linears_.prepare(group, x_D, largest, token, count, thread);
}

void Encoder::attend(const EncoderBlock& block, const Pass& pass, int thread) {
    const std::vector<int>& shares = pass.shares.at(block.window);
    for (int i = shares[std::size_t(thread)]; i < shares[std::size_t(thread) + 1]; ++i)
        attend_head(block, pass.texts[std::size_t(i / config_.num_heads)], i % config_.num_heads, thread);
}

// One head of all tokens of a text.
void Encoder::attend_head(const EncoderBlock& block, const Text& text, int head, int thread) {
    const int E = config_.head_dim;
    const std::size_t begin = std::size_t(text.first) * heads_stride_ + std::size_t(head) * std::size_t(E);
    float *q = buffers_->q.floats() + begin, *k = buffers_->k.floats() + begin;
    KvCache& cache = keys_values_[std::size_t(thread)];
    for (int p = 0; p < text.length; ++p) {
        const std::size_t row = std::size_t(p) * heads_stride_;
        if (block.rope >= 0) {
            const float* angles = angles_[std::size_t(block.rope)].data() + std::size_t(p) * std::size_t(E);
            for (float* x_E : {q + row, k + row}) kernels_.rope(x_E, 1, E, angles);
        }
        cache.store(0, 0, p, k + row, buffers_->v.floats() + begin + row, p + 1 == text.length);
    }
    const std::size_t scratch = attention_scratch_floats(kAttentionTokens, E);
    for (int t = 0, count; t < text.length; t += count) {
        // the last position that token t sees, if the text goes on so far
        const int position = block.window == kNoWindow ? text.length - 1 : t + block.window / 2;
        const std::size_t row = std::size_t(t) * heads_stride_;
        count = std::min({kAttentionTokens, text.length - t, same_first_chunk(position, block.window)});
        const int seen = std::min(text.length, position + count);
        attention_.attention({.layout = {Values::f32, E},
                              .chunks = cache.chunks(),
                              .head_begin = 0,
                              .begin = first_chunk(position, block.window),
                              .end = (seen + kChunkPositions - 1) / kChunkPositions,
                              .q = q + row,
                              .out = buffers_->attended.floats() + begin + row,
                              .stride = heads_stride_,
                              .num_tokens = count,
                              .num_heads = 1,
                              .position = position,
                              .num_positions = text.length,
                              .window = block.window,
                              .scale = float(1.0 / std::sqrt(double(E))),
                              .state = nullptr,
                              .scratch = attention_scratch_.floats() + std::size_t(thread) * scratch});
    }
}

// This thread's columns of a text's vector.
void Encoder::pool_text(const Pass& pass, const Text& text, Pooling pooling, int thread,
                        float* vector_D) const {
    const Part part(config_.hidden_size, thread, pool_.size());
    const float* h_D = hidden(text.first, pass.num_tokens, thread);
    std::copy(h_D + part.begin, h_D + part.end, vector_D + part.begin);
    if (pooling == Pooling::cls) return;
    for (int t = 1; t < text.length; ++t) {
        h_D = hidden(text.first + t, pass.num_tokens, thread);
        for (int d = part.begin; d < part.end; ++d)
            vector_D[d] = pooling == Pooling::max ? std::max(vector_D[d], h_D[d]) : vector_D[d] + h_D[d];
    }
    if (pooling == Pooling::max) return;
    for (int d = part.begin; d < part.end; ++d) vector_D[d] /= float(text.length);
}

}  // namespace gossamer
