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
      most_tokens_(std::max(kPassTokens, config_.max_length())),
      hidden_stride_(round_up(std::size_t(config_.hidden_size), kPanelRows)),
      heads_stride_(round_up(std::size_t(config_.num_heads) * std::size_t(config_.head_dim), kPanelRows)),
      inner_stride_(round_up(std::size_t(config_.intermediate_size), kPanelRows)),
      linears_(int(std::max({hidden_stride_, heads_stride_, inner_stride_})), pool),
      hidden_(std::size_t(std::max(most_tokens_, pool.size())) * hidden_stride_ * sizeof(float)),
      q_(std::size_t(most_tokens_) * heads_stride_ * sizeof(float)),
      k_(std::size_t(most_tokens_) * heads_stride_ * sizeof(float)),
      v_(std::size_t(most_tokens_) * heads_stride_ * sizeof(float)),
      attended_(std::size_t(most_tokens_) * heads_stride_ * sizeof(float)),
      inner_(Linears::kMaxTokens * inner_stride_ * sizeof(float)),
      product_(Linears::kMaxTokens * hidden_stride_ * sizeof(float)),
      attention_scratch_(std::size_t(pool.size()) *
                         attention_scratch_floats(kAttentionTokens, config_.head_dim) * sizeof(float)) {
    for (int i = 0; i < pool.size(); ++i) {
        keys_values_.emplace_back(KvLayout{Values::f32, config_.head_dim}, 1, 1, config_.max_length());
        keys_values_.back().reserve(config_.max_length());
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
        split(pass);
        pool_.run([&](int thread) {
            embed(texts, pass, thread);
            for (const EncoderBlock& block : weights_.blocks) run_block(block, pass, thread);
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
void Encoder::split(Pass& pass) const {
    const int heads = config_.num_heads, threads = pool_.size();
    std::int64_t total = 0, before = 0;
    for (const Text& text : pass.texts) total += std::int64_t(heads) * text.length * text.length;
    pass.shares.assign(std::size_t(threads) + 1, int(pass.texts.size()) * heads);
    pass.shares[0] = 0;
    for (int i = 0, thread = 0; i < int(pass.texts.size()) * heads; ++i) {
        const std::int64_t length = pass.texts[std::size_t(i / heads)].length, cost = length * length;
        const int owner = std::min(int((before + cost / 2) * threads / total), threads - 1);
        while (thread < owner) pass.shares[std::size_t(++thread)] = i;
        before += cost;
    }
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
    std::vector<const float*> positions;  // of each token: its row
    for (const Text& text : pass.texts) {
        for (int p = 0; p < text.length; ++p)
            positions.push_back(weights_.positions + std::size_t(config_.first_position + p) * D);
    }
    linears_.for_tokens(pass.num_tokens, thread, [&](int t) {
        const std::size_t token = pass.first_token + std::size_t(t);
        float* h_D = hidden(t, pass.num_tokens, thread);
        look_up(weights_.embedding, texts.ids[token], h_D);
        const float *position_D = positions[std::size_t(t)],
                    *type_D = weights_.types + std::size_t(texts.types[token]) * D;
        for (std::size_t d = 0; d < D; ++d) h_D[d] = h_D[d] + type_D[d] + position_D[d];
        kernels_.layernorm(h_D, weights_.norm.weight, weights_.norm.bias, config_.norm_eps, int(D), h_D);
    });
}

void Encoder::run_block(const EncoderBlock& block, const Pass& pass, int thread) {
    const int T = pass.num_tokens, D = config_.hidden_size, AE = config_.num_heads * config_.head_dim;
    for_slices(T, [&](int first, int count) {
        linears_.for_tokens(count, thread, [&](int t) {
            const float* h_D = hidden(first + t, T, thread);
            linears_.prepare(block.qkv, h_D, kernels_.largest(h_D, D), t, count, thread);
        });
        const std::size_t row = std::size_t(first) * heads_stride_;
        linears_.multiply(block.qkv, count, {q_.floats() + row, k_.floats() + row, v_.floats() + row},
                          thread);
        pool_.barrier();
    });
    attend(pass, thread);
    pool_.barrier();
    for_slices(T, [&](int first, int count) {
        linears_.for_tokens(count, thread, [&](int t) {
            const float* x = attended_.floats() + std::size_t(first + t) * heads_stride_;
            linears_.prepare(block.o, x, kernels_.largest(x, AE), t, count, thread);
        });
        linears_.multiply(block.o, count, {product_.floats()}, thread);
        pool_.barrier();
        linears_.for_tokens(count, thread, [&](int t) {
            float* h_D = hidden(first + t, T, thread);
            const float largest = add_product(block.attention_norm, t, h_D);
            linears_.prepare(block.up, h_D, largest, t, count, thread);
        });
        linears_.multiply(block.up, count, {inner_.floats()}, thread);
        linears_.activate(block.up, count, thread, [&](int t, int begin, int end) {
            float* x = inner_.floats() + std::size_t(t) * inner_stride_ + begin;
            return kernels_.gelu(x, end - begin, x);
        });
        pool_.barrier();
        linears_.for_tokens(count, thread, [&](int t) {
            const float* x = inner_.floats() + std::size_t(t) * inner_stride_;
            linears_.prepare(block.down, x, linears_.largest(t), t, count, thread);
        });
        linears_.multiply(block.down, count, {product_.floats()}, thread);
        pool_.barrier();
        linears_.for_tokens(count, thread, [&](int t) {
            add_product(block.feed_forward_norm, t, hidden(first + t, T, thread));
        });
    });
}

// h = LayerNorm(h + product) of one token, whose product is in `row`; returns the largest magnitude.
float Encoder::add_product(const LayerNorm& norm, int row, float* h_D) const {
    const float* y_D = product_.floats() + std::size_t(row) * hidden_stride_;
    for (int d = 0; d < config_.hidden_size; ++d) h_D[d] += y_D[d];
    return kernels_.layernorm(h_D, norm.weight, norm.bias, config_.norm_eps, config_.hidden_size, h_D);
}

void Encoder::attend(const Pass& pass, int thread) {
    for (int i = pass.shares[std::size_t(thread)]; i < pass.shares[std::size_t(thread) + 1]; ++i)
        attend_head(pass.texts[std::size_t(i / config_.num_heads)], i % config_.num_heads, thread);
}

// One head of all tokens of a text.
void Encoder::attend_head(const Text& text, int head, int thread) {
    const int E = config_.head_dim;
    const std::size_t begin = std::size_t(text.first) * heads_stride_ + std::size_t(head) * std::size_t(E);
    KvCache& cache = keys_values_[std::size_t(thread)];
    for (int p = 0; p < text.length; ++p) {
        const std::size_t row = begin + std::size_t(p) * heads_stride_;
        cache.store(0, 0, p, k_.floats() + row, v_.floats() + row, p + 1 == text.length);
    }
    const std::size_t scratch = attention_scratch_floats(kAttentionTokens, E);
    for (int t = 0; t < text.length; t += kAttentionTokens) {
        const std::size_t row = begin + std::size_t(t) * heads_stride_;
        attention_.attention({.layout = {Values::f32, E},
                              .chunks = cache.chunks(),
                              .head_begin = 0,
                              .begin = 0,
                              .end = (text.length + kChunkPositions - 1) / kChunkPositions,
                              .q = q_.floats() + row,
                              .out = attended_.floats() + row,
                              .stride = heads_stride_,
                              .num_tokens = std::min(kAttentionTokens, text.length - t),
                              .num_heads = 1,
                              .position = text.length - 1,
                              .causal = false,
                              .window = kNoWindow,
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
