#include "engine/decoder.hpp"

#include <algorithm>
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

DecoderConfig checked(DecoderConfig config) {
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

Layer Decoder::read_layer(const Packed& packed, int index,
                          std::vector<std::pair<std::string, Linear>>& all) const {
    const DecoderConfig& c = config_;
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

Decoder::Decoder(const Packed& packed, DecoderConfig config, Values kv, ThreadPool& pool)
    : config_(checked(std::move(config))),
      pool_(pool),
      kernels_(find_vector(isa())),
      attention_(find_attention(kv, isa())),
      kv_{kv, config_.head_dim},
      embedding_(packed.linear("model.embed_tokens")),
      final_norm_(packed.vector("model.norm.weight", config_.hidden_size)),
      head_({packed.linear(packed.matrices.count("lm_head") ? "lm_head" : "model.embed_tokens")}, false,
            pool.size()),
      hidden_stride_(round_up(config_.hidden_size, 16)),
      q_stride_(round_up(config_.num_heads * config_.head_dim, 16)),
      kv_stride_(round_up(config_.num_kv_heads * config_.head_dim, 16)),
      inner_stride_(round_up(config_.intermediate_size, 16)),
      linears_(int(std::max({hidden_stride_, q_stride_, inner_stride_})), pool),
      hidden_(kMaxTokens * hidden_stride_ * sizeof(float)),
      q_(kMaxTokens * q_stride_ * sizeof(float)),
      k_(kMaxTokens * kv_stride_ * sizeof(float)),
      v_(kMaxTokens * kv_stride_ * sizeof(float)),
      attended_(kMaxTokens * q_stride_ * sizeof(float)),
      gate_(kMaxTokens * inner_stride_ * sizeof(float)),
      up_(kMaxTokens * inner_stride_ * sizeof(float)),
      product_(kMaxTokens * hidden_stride_ * sizeof(float)),
      rows_(std::size_t(pool.size()) * hidden_stride_ * sizeof(float)),
      rotary_(kMaxTokens * std::size_t(config_.head_dim) * sizeof(float)),
      attention_scratch_(std::size_t(pool.size()) * attention_scratch_floats_of_a_thread() * sizeof(float)) {
    std::vector<std::pair<std::string, Linear>> all;
    all.emplace_back("model.embed_tokens", embedding_);
    all.emplace_back("the head", head_.matrices[0]);
    for (const auto& [name, w] : all) expect_shape(name, w, config_.vocab_size, config_.hidden_size);
    if (embedding_.storage == Storage::sparse || is_integer(embedding_.values)) {
        throw FormatError("model.embed_tokens: expected dense f32 or bf16");
    }
    if (head_.matrices[0].data == embedding_.data) all.pop_back();
    for (int i = 0; i < config_.num_layers; ++i) layers_.push_back(read_layer(packed, i, all));
    check_contents(all, pool_);
}

// A long batch goes through in passes of kMaxTokens, in order, so that later tokens find earlier ones in the
// cache.
void Decoder::forward(std::span<const NewTokens> batch, bool all_logits, float* logits) {
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

void Decoder::run(Pass& pass) {
    plan_attention(pass);
    pool_.run([&](int thread) {
        embed(pass, thread);
        for (int layer = 0; layer < config_.num_layers; ++layer) decoder_layer(pass, layer, thread);
        if (!pass.outputs.empty()) head(pass, thread);
    });
}

// Rows of the embedding, from its panels, and the rotary angles.
void Decoder::embed(const Pass& pass, int thread) {
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

void Decoder::decoder_layer(const Pass& pass, int index, int thread) {
    const Layer& layer = layers_[index];
    const int T = int(pass.tokens.size());
    normalize(layer.input_norm, layer.qkv, T, nullptr, thread);
    linears_.multiply(layer.qkv, T, {q_.floats(), k_.floats(), v_.floats()}, thread);
    pool_.barrier();
    attend(pass, index, thread);
    pool_.barrier();
    linears_.for_tokens(T, thread, [&](int t) {
        const int width = config_.num_heads * config_.head_dim;
        const float* row = attended_.floats() + t * q_stride_;
        linears_.prepare(layer.o, row, kernels_.largest(row, width), t, T, thread);
    });
    linears_.multiply(layer.o, T, {product_.floats()}, thread);
    add_to_hidden(layer.o, T, thread);
    pool_.barrier();
    normalize(layer.post_attention_norm, layer.gate_up, T, nullptr, thread);
    linears_.multiply(layer.gate_up, T, {gate_.floats(), up_.floats()}, thread);
    linears_.activate(layer.gate_up, T, thread, [&](int t, int begin, int end) {
        float* gate = gate_.floats() + t * inner_stride_ + begin;
        return kernels_.swiglu(gate, up_.floats() + t * inner_stride_ + begin, end - begin, gate);
    });
    pool_.barrier();
    linears_.for_tokens(T, thread, [&](int t) {
        linears_.prepare(layer.down, gate_.floats() + t * inner_stride_, linears_.largest(t), t, T, thread);
    });
    linears_.multiply(layer.down, T, {product_.floats()}, thread);
    add_to_hidden(layer.down, T, thread);
    pool_.barrier();
}

void Decoder::head(const Pass& pass, int thread) {
    const int count = int(pass.outputs.size());
    normalize(final_norm_, head_, count, pass.outputs.data(), thread);
    linears_.multiply(head_, count, {pass.logits}, thread);
}

// RMSNorm of hidden rows (all, or those listed) as the input of a group.
void Decoder::normalize(const float* weight, const Group& group, int num_tokens, const int* rows,
                        int thread) {
    float* row = rows_.floats() + thread * hidden_stride_;
    linears_.for_tokens(num_tokens, thread, [&](int t) {
        const float* hidden = hidden_.floats() + (rows ? rows[t] : t) * hidden_stride_;
        const float largest =
            kernels_.rmsnorm(hidden, weight, config_.rms_norm_eps, config_.hidden_size, row);
        linears_.prepare(group, row, largest, t, num_tokens, thread);
    });
}

void Decoder::add_to_hidden(const Group& group, int num_tokens, int thread) {
    Linears::for_rows(group, thread, [&](int, int begin, int end) {
        for (int t = 0; t < num_tokens; ++t) {
            float* hidden = hidden_.floats() + t * hidden_stride_;
            const float* y = product_.floats() + t * hidden_stride_;
            for (int n = begin; n < end; ++n) hidden[n] += y[n];
        }
    });
}

double Decoder::time_linears(int num_tokens) {
    return linears_.time([&](int thread) {
        for (const Layer& layer : layers_) {
            linears_.multiply(layer.qkv, num_tokens, {q_.floats(), k_.floats(), v_.floats()}, thread);
            pool_.barrier();
            linears_.multiply(layer.o, num_tokens, {product_.floats()}, thread);
            pool_.barrier();
            linears_.multiply(layer.gate_up, num_tokens, {gate_.floats(), up_.floats()}, thread);
            pool_.barrier();
            linears_.multiply(layer.down, num_tokens, {product_.floats()}, thread);
            pool_.barrier();
        }
    });
}

std::size_t Decoder::bytes_per_step() const {
    const std::size_t norm = std::size_t(config_.hidden_size) * sizeof(float);
    std::size_t total = norm + head_.bytes();
    total += std::size_t(config_.hidden_size) * (embedding_.values == Values::f32 ? 4 : 2);
    for (const Layer& layer : layers_) {
        total += 2 * norm;
        for (const Group* group : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
            total += group->bytes();
    }
    return total;
}

}  // namespace gossamer
