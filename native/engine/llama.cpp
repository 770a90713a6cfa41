#include "engine/llama.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>

namespace gossamer {
namespace {

void expect_shape(const std::string& name, const Linear& w, int rows, int columns) {
    if (w.rows == rows && w.columns == columns) return;
    throw FormatError(name + ": found " + std::to_string(w.rows) + " x " + std::to_string(w.columns) +
                      "; expected " + std::to_string(rows) + " x " + std::to_string(columns) +
                      " from the model's config");
}

LlamaConfig checked(LlamaConfig config) {
    for (int number : {config.num_layers, config.hidden_size, config.intermediate_size, config.num_heads,
                       config.num_kv_heads, config.head_dim, config.vocab_size}) {
        if (number < 1 || number > 1 << 24)
            throw FormatError("the model's config has a size outside 1 .. 2^24");
    }
    const bool sound = config.num_heads % config.num_kv_heads == 0 && config.head_dim % 2 == 0 &&
                       config.inverse_frequencies.size() == std::size_t(config.head_dim / 2);
    if (!sound)
        throw FormatError("the model's config: heads, key/value heads and head width do not fit together");
    return config;
}

Linear read_matrix(const Packed& packed, const std::string& name, int rows, int columns,
                   std::vector<std::pair<std::string, Linear>>& all) {
    const Linear w = packed.linear(name);
    expect_shape(name, w, rows, columns);
    all.emplace_back(name, w);
    return w;
}

}  // namespace

Group::Group(std::vector<Linear> matrices, bool paired, int num_threads)
    : linears(std::move(matrices)), shares(std::size_t(num_threads)) {
    const std::size_t split = paired ? 1 : linears.size();
    std::size_t total = 0, before = 0;
    for (const Linear& w : linears) {
        kernels.push_back(&find_matmul(w.storage, w.values, isa()));
        (is_integer(w.values) ? needs_i8 : needs_f32) = true;
        needs_split = needs_split || (w.values == Values::bf16 && kernels.back()->isa == Isa::amx);
        total += w.panel_bytes(0, w.num_panels());
    }
    for (std::size_t i = 0; i < split; ++i) {
        for (int panel = 0; panel < linears[i].num_panels(); ++panel) {
            std::size_t cost = linears[i].panel_bytes(panel, panel + 1);
            for (std::size_t j = split; j < linears.size(); ++j)
                cost += linears[j].panel_bytes(panel, panel + 1);
            const std::size_t middle =
                (before + cost / 2) * std::size_t(num_threads) / std::max<std::size_t>(total, 1);
            auto& mine = shares[std::min(middle, std::size_t(num_threads) - 1)];
            if (mine.empty() || mine.back().linear != int(i)) mine.push_back({int(i), panel, panel});
            mine.back().end = panel + 1;
            before += cost;
        }
    }
}

Layer Llama::read_layer(const Packed& packed, int index,
                        std::vector<std::pair<std::string, Linear>>& all) const {
    const LlamaConfig& c = config_;
    const std::string prefix = "model.layers." + std::to_string(index) + ".";
    const int D = c.hidden_size, F = c.intermediate_size, AE = c.num_heads * c.head_dim,
              GE = c.num_kv_heads * c.head_dim;
    const auto matrix = [&](const char* name, int rows, int columns) {
        return read_matrix(packed, prefix + name, rows, columns, all);
    };
    const int threads = pool_.size();
    const Linear q = matrix("self_attn.q_proj", AE, D), k = matrix("self_attn.k_proj", GE, D);
    const Linear v = matrix("self_attn.v_proj", GE, D), o = matrix("self_attn.o_proj", D, AE);
    const Linear gate = matrix("mlp.gate_proj", F, D), up = matrix("mlp.up_proj", F, D);
    return Layer{.input_norm = packed.vector(prefix + "input_layernorm.weight", D),
                 .post_attention_norm = packed.vector(prefix + "post_attention_layernorm.weight", D),
                 .qkv = Group({q, k, v}, false, threads),
                 .o = Group({o}, false, threads),
                 .gate_up = Group({gate, up}, true, threads),
                 .down = Group({matrix("mlp.down_proj", D, F)}, false, threads)};
}

Llama::Llama(const Packed& packed, LlamaConfig config, Values kv, ThreadPool& pool)
    : config_(checked(std::move(config))),
      pool_(pool),
      kernels_(find_vector(isa())),
      attention_(find_attention(kv, isa())),
      kv_{kv, config_.head_dim},
      embedding_(packed.linear("model.embed_tokens")),
      final_norm_(packed.vector("model.norm.weight", config_.hidden_size)),
      head_({packed.linear(packed.layers.count("lm_head") ? "lm_head" : "model.embed_tokens")}, false,
            pool.size()),
      hidden_stride_(round_up(config_.hidden_size, 16)),
      q_stride_(round_up(config_.num_heads * config_.head_dim, 16)),
      kv_stride_(round_up(config_.num_kv_heads * config_.head_dim, 16)),
      inner_stride_(round_up(config_.intermediate_size, 16)),
      input_stride_(Activations::padded(int(std::max({hidden_stride_, q_stride_, inner_stride_})))),
      hidden_(kMaxTokens * hidden_stride_ * sizeof(float)),
      q_(kMaxTokens * q_stride_ * sizeof(float)),
      k_(kMaxTokens * kv_stride_ * sizeof(float)),
      v_(kMaxTokens * kv_stride_ * sizeof(float)),
      attended_(kMaxTokens * q_stride_ * sizeof(float)),
      gate_(kMaxTokens * inner_stride_ * sizeof(float)),
      up_(kMaxTokens * inner_stride_ * sizeof(float)),
      product_(kMaxTokens * hidden_stride_ * sizeof(float)),
      rows_(std::size_t(pool.size()) * hidden_stride_ * sizeof(float)),
      x_(std::size_t(std::max(kMaxTokens, pool.size())) * input_stride_ * sizeof(float)),
      x_i8_(std::size_t(std::max(kMaxTokens, pool.size())) * input_stride_),
      x_block_(Activations::kBlockTokens * input_stride_),
      x_high_(kMaxTokens * input_stride_ * sizeof(std::uint16_t)),
      x_low_(kMaxTokens * input_stride_ * sizeof(std::uint16_t)),
      scales_(std::size_t(std::max(kMaxTokens, pool.size())) * sizeof(float)),
      largest_(std::size_t(pool.size()) * kMaxTokens * sizeof(float)),
      rotary_(kMaxTokens * std::size_t(config_.head_dim) * sizeof(float)),
      attention_scratch_(std::size_t(pool.size()) * attention_scratch_floats_of_a_thread() * sizeof(float)) {
    std::vector<std::pair<std::string, Linear>> all;
    all.emplace_back("model.embed_tokens", embedding_);
    all.emplace_back("the head", head_.linears[0]);
    for (const auto& [name, w] : all) expect_shape(name, w, config_.vocab_size, config_.hidden_size);
    if (embedding_.storage == Storage::sparse || is_integer(embedding_.values)) {
        throw FormatError("model.embed_tokens: expected dense f32 or bf16");
    }
    if (head_.linears[0].data == embedding_.data) all.pop_back();
    for (int i = 0; i < config_.num_layers; ++i) layers_.push_back(read_layer(packed, i, all));
    check_contents(all, pool_);
}

// A long batch goes through in passes of kMaxTokens, in order, so that later tokens find earlier ones in the
// cache.
void Llama::forward(std::span<const NewTokens> batch, bool all_logits, float* logits) {
    Pass pass{.logits = logits};
    const auto flush = [&] {
        run(pass);
        pass.logits += pass.outputs.size() * std::size_t(padded_vocab());
        pass.tokens.clear();
        pass.runs.clear();
        pass.outputs.clear();
    };
    for (const NewTokens& fresh : batch) fresh.cache->reserve(fresh.cache->length() + int(fresh.ids.size()));
    for (const NewTokens& fresh : batch) {
        const int count = int(fresh.ids.size()), start = fresh.cache->length();
        for (int done = 0; done < count;) {
            const int first = int(pass.tokens.size()), take = std::min(count - done, kMaxTokens - first);
            pass.runs.push_back({fresh.cache, first, take, start + done});
            for (int i = 0; i < take; ++i, ++done) {
                if (all_logits || done == count - 1) pass.outputs.push_back(first + i);
                pass.tokens.push_back({fresh.ids[done], start + done});
            }
            if (int(pass.tokens.size()) == kMaxTokens) flush();
        }
    }
    if (!pass.tokens.empty()) flush();
    for (const NewTokens& fresh : batch)
        fresh.cache->set_length(fresh.cache->length() + int(fresh.ids.size()));
}

void Llama::run(Pass& pass) {
    plan_attention(pass);
    pool_.run([&](int thread) {
        embed(pass, thread);
        for (int layer = 0; layer < config_.num_layers; ++layer) decoder_layer(pass, layer, thread);
        if (!pass.outputs.empty()) head(pass, thread);
    });
}

// Rows of the embedding, from its panels, and the rotary angles.
void Llama::embed(const Pass& pass, int thread) {
    const Part part(int(pass.tokens.size()), thread, pool_.size());
    for (int t = part.begin; t < part.end; ++t) {
        const auto [id, position] = pass.tokens[t];
        const std::uint8_t* panel = embedding_.panel(id / kPanelRows) + id % kPanelRows * 4;
        float* hidden = hidden_.floats() + t * hidden_stride_;
        for (int d = 0; d < config_.hidden_size; ++d) {
            if (embedding_.values == Values::f32) {
                std::memcpy(&hidden[d], panel + std::size_t(d) * kVectorBytes, sizeof(float));
            } else {
                std::uint16_t bits;
                std::memcpy(&bits, panel + std::size_t(d / 2) * kVectorBytes + d % 2 * 2, sizeof bits);
                hidden[d] = std::bit_cast<float>(std::uint32_t(bits) << 16);
            }
        }
    }
    rotary_angles(pass, thread);
    pool_.barrier();
}

void Llama::decoder_layer(const Pass& pass, int index, int thread) {
    const Layer& layer = layers_[index];
    const int T = int(pass.tokens.size());
    normalize(layer.input_norm, layer.qkv, T, nullptr, thread);
    multiply(layer.qkv, T, {q_.floats(), k_.floats(), v_.floats()}, thread);
    pool_.barrier();
    attend(pass, index, thread);
    pool_.barrier();
    for_tokens(T, thread, [&](int t) {
        const int width = config_.num_heads * config_.head_dim;
        const float* row = attended_.floats() + t * q_stride_;
        prepare(layer.o, row, width, kernels_.largest(row, width), t, T, thread);
    });
    multiply(layer.o, T, {product_.floats()}, thread);
    add_to_hidden(layer.o, T, thread);
    pool_.barrier();
    normalize(layer.post_attention_norm, layer.gate_up, T, nullptr, thread);
    multiply(layer.gate_up, T, {gate_.floats(), up_.floats()}, thread);
    activate(layer.gate_up, T, thread);
    pool_.barrier();
    for_tokens(T, thread, [&](int t) {
        float largest = 0;
        for (int i = 0; i < pool_.size(); ++i)
            largest = std::max(largest, largest_.floats()[std::size_t(i) * kMaxTokens + t]);
        prepare(layer.down, gate_.floats() + t * inner_stride_, config_.intermediate_size, largest, t, T,
                thread);
    });
    multiply(layer.down, T, {product_.floats()}, thread);
    add_to_hidden(layer.down, T, thread);
    pool_.barrier();
}

// Work that a group's inputs need, token by token, split among the threads. For a single token every thread
// does it for itself: that takes a microsecond, and so does the barrier that it saves.
template <class Work>
void Llama::for_tokens(int num_tokens, int thread, Work work) {
    if (num_tokens == 1) return work(0);
    const Part part(num_tokens, thread, pool_.size());
    for (int t = part.begin; t < part.end; ++t) work(t);
    pool_.barrier();
}

// Where a thread finds the inputs of a group: its own copy of a single token's, else the shared rows.
Activations Llama::inputs(int num_tokens, int thread) const {
    const std::size_t first = num_tokens == 1 ? std::size_t(thread) : 0;
    return {.num_tokens = num_tokens,
            .stride = input_stride_,
            .x = x_.floats() + first * input_stride_,
            .q = x_i8_.bytes() + first * input_stride_,
            .q_block = num_tokens == 1 ? x_i8_.bytes() + first * input_stride_ : x_block_.bytes(),
            .scale = scales_.floats() + first,
            .high = reinterpret_cast<const std::uint16_t*>(x_high_.bytes()),
            .low = reinterpret_cast<const std::uint16_t*>(x_low_.bytes())};
}

// SwiGLU of the rows that this thread has just multiplied, in place of the gate.
void Llama::activate(const Group& gate_up, int num_tokens, int thread) {
    float* largest = largest_.floats() + std::size_t(thread) * kMaxTokens;
    std::fill_n(largest, num_tokens, 0.0f);
    for (const Share& share : gate_up.shares[thread]) {
        const int first = share.begin * kPanelRows;
        const int count = std::min(share.end * kPanelRows, config_.intermediate_size) - first;
        for (int t = 0; t < num_tokens; ++t) {
            float* gate = gate_.floats() + t * inner_stride_ + first;
            const float* up = up_.floats() + t * inner_stride_ + first;
            largest[t] = std::max(largest[t], kernels_.swiglu(gate, up, count, gate));
        }
    }
}

void Llama::head(const Pass& pass, int thread) {
    const int count = int(pass.outputs.size());
    normalize(final_norm_, head_, count, pass.outputs.data(), thread);
    multiply(head_, count, {pass.logits}, thread);
}

// RMSNorm of hidden rows (all, or those listed) as the input of a group.
void Llama::normalize(const float* weight, const Group& group, int num_tokens, const int* rows, int thread) {
    float* row = rows_.floats() + thread * hidden_stride_;
    for_tokens(num_tokens, thread, [&](int t) {
        const float* hidden = hidden_.floats() + (rows ? rows[t] : t) * hidden_stride_;
        const float largest =
            kernels_.rmsnorm(hidden, weight, config_.rms_norm_eps, config_.hidden_size, row);
        prepare(group, row, config_.hidden_size, largest, t, num_tokens, thread);
    });
}

// Puts one row of inputs where the group's kernels read it.
void Llama::prepare(const Group& group, const float* row, int columns, float largest, int token,
                    int num_tokens, int thread) {
    const std::size_t index = num_tokens == 1 ? std::size_t(thread) : std::size_t(token);
    const std::size_t begin = index * input_stride_, pad = Activations::padded(columns) - columns;
    if (group.needs_i8) {
        std::uint8_t* q = x_i8_.bytes() + begin;
        scales_.floats()[index] = kernels_.quantize(row, columns, largest, q);
        if (num_tokens > 1 && num_tokens <= Activations::kBlockTokens)
            Activations::interleave(q, columns, token, num_tokens, x_block_.bytes());
    }
    if (!group.needs_f32) return;
    float* x = x_.floats() + begin;
    std::copy(row, row + columns, x);
    std::fill_n(x + columns, pad, 0.0f);
    if (!group.needs_split || num_tokens == 1) return;
    auto* high = reinterpret_cast<std::uint16_t*>(x_high_.bytes()) + begin;
    auto* low = reinterpret_cast<std::uint16_t*>(x_low_.bytes()) + begin;
    kernels_.split(x, columns + int(pad), high, low);
}

void Llama::multiply(const Group& group, int num_tokens, std::initializer_list<float*> outputs, int thread) {
    const bool paired = outputs.size() == 2;
    const Activations x = inputs(num_tokens, thread);
    for (const Share& share : group.shares[thread]) {
        for (int i = share.linear; i <= share.linear + int(paired); ++i) {
            const Linear& w = group.linears[i];
            group.kernels[i]->matmul(w, share.begin, share.end, x, outputs.begin()[i],
                                     std::size_t(w.padded_rows()));
        }
    }
}

void Llama::add_to_hidden(const Group& group, int num_tokens, int thread) {
    for (const Share& share : group.shares[thread]) {
        const int end = std::min(share.end * kPanelRows, config_.hidden_size);
        for (int t = 0; t < num_tokens; ++t) {
            float* hidden = hidden_.floats() + t * hidden_stride_;
            const float* y = product_.floats() + t * hidden_stride_;
            for (int n = share.begin * kPanelRows; n < end; ++n) hidden[n] += y[n];
        }
    }
}

double Llama::time_linears(int num_tokens) {
    for (int row = 0; row < std::max(kMaxTokens, pool_.size()); ++row) {
        const std::size_t first = std::size_t(row) * input_stride_;
        std::fill_n(x_.floats() + first, input_stride_, 0.5f);
        for (std::size_t i = 0; i < input_stride_; ++i) x_i8_.bytes()[first + i] = std::uint8_t(i * 37);
        scales_.floats()[row] = 0.01f;
    }
    std::fill_n(x_high_.bytes(), kMaxTokens * input_stride_ * 2, std::uint8_t(0x3F));
    std::fill_n(x_low_.bytes(), kMaxTokens * input_stride_ * 2, std::uint8_t(0x3B));
    const auto begin = std::chrono::steady_clock::now();
    pool_.run([&](int thread) {
        for (const Layer& layer : layers_) {
            multiply(layer.qkv, num_tokens, {q_.floats(), k_.floats(), v_.floats()}, thread);
            pool_.barrier();
            multiply(layer.o, num_tokens, {product_.floats()}, thread);
            pool_.barrier();
            multiply(layer.gate_up, num_tokens, {gate_.floats(), up_.floats()}, thread);
            pool_.barrier();
            multiply(layer.down, num_tokens, {product_.floats()}, thread);
            pool_.barrier();
        }
    });
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

std::size_t Llama::bytes_per_step() const {
    const std::size_t norm = std::size_t(config_.hidden_size) * sizeof(float);
    std::size_t total = norm + head_.linears[0].bytes();
    total += std::size_t(config_.hidden_size) * (embedding_.values == Values::f32 ? 4 : 2);
    for (const Layer& layer : layers_) {
        total += 2 * norm;
        for (const Group* group : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down}) {
            for (const Linear& w : group->linears) total += w.bytes();
        }
    }
    return total;
}

}  // namespace gossamer
