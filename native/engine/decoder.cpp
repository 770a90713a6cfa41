#include "engine/decoder.hpp"

#include <algorithm>
#include <cmath>

#include "engine/embedding.hpp"

namespace gossamer {

Decoder::Decoder(const Packed& packed, DecoderConfig config, Values kv, ThreadPool& pool)
    : config_(std::move(config)),
      pool_(pool),
      kernels_(find_vector(isa())),
      attention_(find_attention(kv, isa())),
      kv_{kv, config_.head_dim},
      weights_(read_weights(packed, config_, pool)),
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
      attention_scratch_(std::size_t(pool.size()) * attention_scratch_floats_of_a_thread() * sizeof(float)) {}

// A long batch goes through in passes of kMaxTokens, in order, so that later tokens find earlier ones in the
// cache.
void Decoder::forward(std::span<const NewTokens> batch, float* logits) {
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
                if (done >= count - fresh.num_outputs) pass.outputs.push_back(first + i);
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
        for (int i = 0; i < num_blocks(); ++i) run_block(pass, i, thread);
        if (!pass.outputs.empty()) head(pass, thread);
    });
}

// Rows of the embedding, and the rotary angles.
void Decoder::embed(const Pass& pass, int thread) {
    const Part part(int(pass.tokens.size()), thread, pool_.size());
    for (int t = part.begin; t < part.end; ++t) {
        const auto [id, position] = pass.tokens[t];
        look_up(weights_.embedding, id, hidden_.floats() + t * hidden_stride_);
    }
    rotary_angles(pass, thread);
    pool_.barrier();
}

void Decoder::run_block(const Pass& pass, int index, int thread) {
    const Block& block = weights_.blocks[std::size_t(index)];
    const int T = int(pass.tokens.size());
    normalize(block.attention_norm, block.qkv, T, nullptr, thread);
    linears_.multiply(block.qkv, T, {q_.floats(), k_.floats(), v_.floats()}, thread);
    pool_.barrier();
    attend(pass, index, thread);
    pool_.barrier();
    linears_.for_tokens(T, thread, [&](int t) {
        const int width = config_.num_heads * config_.head_dim;
        const float* row = attended_.floats() + t * q_stride_;
        linears_.prepare(block.o, row, kernels_.largest(row, width), t, T, thread);
    });
    linears_.multiply(block.o, T, {product_.floats()}, thread);
    add_to_hidden(block.o, T, thread);
    pool_.barrier();
    normalize(block.feed_forward_norm, block.gate_up, T, nullptr, thread);
    linears_.multiply(block.gate_up, T, {gate_.floats(), up_.floats()}, thread);
    linears_.activate(block.gate_up, T, thread, [&](int t, int begin, int end) {
        float* gate = gate_.floats() + t * inner_stride_ + begin;
        return kernels_.swiglu(gate, up_.floats() + t * inner_stride_ + begin, end - begin, gate);
    });
    pool_.barrier();
    linears_.for_tokens(T, thread, [&](int t) {
        linears_.prepare(block.down, gate_.floats() + t * inner_stride_, linears_.largest(t), t, T, thread);
    });
    linears_.multiply(block.down, T, {product_.floats()}, thread);
    add_to_hidden(block.down, T, thread);
    pool_.barrier();
}

void Decoder::head(const Pass& pass, int thread) {
    const int total = int(pass.outputs.size()), most = kMaxTokens / weights_.head.rows_per_token();
    for (int done = 0; done < total; done += most) {
        if (done > 0) pool_.barrier();  // until then others read the inputs that are overwritten
        const int count = std::min(most, total - done);
        normalize(weights_.final_norm, weights_.head, count, pass.outputs.data() + done, thread);
        linears_.multiply(weights_.head, count, {pass.logits + std::size_t(done) * padded_vocab()}, thread);
    }
}

// RMSNorm of hidden rows (all, or those listed) as the input of a group.
void Decoder::normalize(const float* weight, const Group& group, int num_tokens, const int* rows,
                        int thread) {
    float* row = rows_.floats() + thread * hidden_stride_;
    linears_.for_tokens(num_tokens, thread, [&](int t) {
        const float* hidden = hidden_.floats() + (rows ? rows[t] : t) * hidden_stride_;
        const float largest = kernels_.rmsnorm(hidden, weight, config_.norm_eps, config_.hidden_size, row);
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
        for (const Block& block : weights_.blocks) {
            linears_.multiply(block.qkv, num_tokens, {q_.floats(), k_.floats(), v_.floats()}, thread);
            pool_.barrier();
            linears_.multiply(block.o, num_tokens, {product_.floats()}, thread);
            pool_.barrier();
            linears_.multiply(block.gate_up, num_tokens, {gate_.floats(), up_.floats()}, thread);
            pool_.barrier();
            linears_.multiply(block.down, num_tokens, {product_.floats()}, thread);
            pool_.barrier();
        }
    });
}

std::size_t Decoder::bytes_per_step() const {
    const std::size_t norm = std::size_t(config_.hidden_size) * sizeof(float);
    std::size_t total = norm + weights_.head.bytes();
    total += row_bytes(weights_.embedding);
    for (const Block& block : weights_.blocks) {
        total += 2 * norm;
        for (const float* head_norm : {block.query_norm, block.key_norm})
            total += head_norm != nullptr ? std::size_t(config_.head_dim) * sizeof(float) : 0;
        for (const Group* group : {&block.qkv, &block.o, &block.gate_up, &block.down})
            total += group->bytes();
    }
    return total;
}

}  // namespace gossamer
