// The decoder's attention: how its work is cut into items and split among the threads, and what happens
// before and after the kernels run.
//
// An item is some tokens of one run at one key/value head: the queries of all heads that share it, against
// the cached keys and values. A run of a single token is cut further, into chunks of positions whose partial
// results (states) are merged afterwards, so that one long sequence keeps every thread busy. Where items
// begin and end depends on positions alone, never on the number of threads or on other sequences of the
// batch, so that a sequence gets the same bits in any company.

#include <algorithm>
#include <chrono>
#include <cmath>

#include "engine/decoder.hpp"

namespace gossamer {
namespace {

// Rows (queries of one token and head) of an item, if at least one token fits. An item reads its keys and
// values once for all of its rows.
constexpr int kItemRows = 24;

int num_chunks(int positions) { return (positions + kChunkPositions - 1) / kChunkPositions; }

int item_tokens(int shared_heads) { return std::max(1, kItemRows / shared_heads); }

}  // namespace

KvCache Decoder::new_cache(int capacity) const {
    return KvCache(kv_, num_blocks(), config_.num_kv_heads, capacity);
}

std::size_t Decoder::attention_bytes(int context) const {
    std::size_t positions = 0;
    for (const Block& block : weights_.blocks) positions += std::size_t(std::min(context, block.window));
    return kv_.position_bytes() * positions * std::size_t(config_.num_kv_heads);
}

std::size_t Decoder::attention_scratch_floats_of_a_thread() const {
    const int heads = config_.num_heads / config_.num_kv_heads;
    return round_up(attention_scratch_floats(heads * item_tokens(heads), config_.head_dim), kPanelRows);
}

// Cuts a pass into items and splits them among the threads, for each window that blocks have.
void Decoder::plan_attention(Pass& pass) {
    pass.plans.clear();
    for (const Block& block : weights_.blocks) {
        if (!pass.plans.contains(block.window)) pass.plans[block.window] = plan_window(pass, block.window);
    }
}

// The tokens of an item begin in the same chunk, as kernels want it.
Decoder::AttentionPlan Decoder::plan_window(const Pass& pass, int window) {
    const int heads = config_.num_heads / config_.num_kv_heads, tokens = item_tokens(heads);
    const std::size_t state = attention_state_floats(config_.head_dim) * std::size_t(heads);
    std::size_t states = 0;
    AttentionPlan plan{.window = window, .items = {}, .shares = {}};
    for (int r = 0; r < int(pass.runs.size()); ++r) {
        const Run& run = pass.runs[r];
        const int begin = first_chunk(run.position, window), end = num_chunks(run.position + run.count);
        const bool split_chunks = run.count == 1 && end - begin > 1;
        for (int c = begin; split_chunks && c < end; ++c) {  // in the order of memory
            for (int head = 0; head < config_.num_kv_heads; ++head, states += state)
                plan.items.push_back({r, head, 0, 1, c, c + 1, std::ptrdiff_t(states)});
        }
        for (int head = 0; !split_chunks && head < config_.num_kv_heads; ++head) {
            for (int first = 0, count; first < run.count; first += count) {
                const int position = run.position + first;
                count = std::min({tokens, run.count - first, same_first_chunk(position, window)});
                plan.items.push_back(
                    {r, head, first, count, first_chunk(position, window), num_chunks(position + count), -1});
            }
        }
    }
    if (attention_states_.size() < states) attention_states_.resize(states);
    split(pass, plan);
    return plan;
}

// Gives every thread consecutive items with about as many products of a query and a key as any other's.
void Decoder::split(const Pass& pass, AttentionPlan& plan) const {
    const auto cost = [&](const AttentionItem& item) {
        const Run& run = pass.runs[item.run];
        const int last = std::min(item.end * kChunkPositions, run.position + item.first + item.count);
        return std::size_t(item.count) * std::size_t(last - item.begin * kChunkPositions);
    };
    const std::size_t threads = std::size_t(pool_.size());
    std::size_t total = 0, before = 0;
    for (const AttentionItem& item : plan.items) total += cost(item);
    plan.shares.assign(threads + 1, plan.items.size());
    plan.shares[0] = 0;
    for (std::size_t i = 0, thread = 0; i < plan.items.size(); ++i) {
        const std::size_t mine = cost(plan.items[i]);
        const std::size_t owner = std::min((before + mine / 2) * threads / total, threads - 1);
        while (thread < owner) plan.shares[++thread] = i;
        before += mine;
    }
}

// The cosine and sine of position * frequency (multiplied in float32) for the tokens of a thread.
void Decoder::rotary_angles(const Pass& pass, int thread) {
    const int half = config_.head_dim / 2;
    const Part part(int(pass.tokens.size()), thread, pool_.size());
    for (int t = part.begin; t < part.end; ++t) {
        float* rotary = rotary_.floats() + std::size_t(t) * config_.head_dim;
        for (int e = 0; e < half; ++e) {
            const float angle = float(pass.tokens[t].position) * config_.inverse_frequencies[e];
            rotary[e] = float(std::cos(double(angle))) * config_.rotary_scale;
            rotary[half + e] = float(std::sin(double(angle))) * config_.rotary_scale;
        }
    }
}

void Decoder::attend(const Pass& pass, int index, int thread) {
    const AttentionPlan& plan = pass.plans.at(weights_.blocks[std::size_t(index)].window);
    store(pass, index, thread);
    pool_.barrier();
    for (std::size_t i = plan.shares[thread]; i < plan.shares[thread + 1]; ++i)
        attend_item(pass, plan.items[i], index, thread);
    merge_states(pass, plan, thread);
}

// What happens to the heads of one token between their product and attention: RMSNorm of each head by itself
// and rotation by the token's position, where the block has them.
void Decoder::prepare_heads(const Block& block, float* x_HE, const float* norm, int num_heads,
                            int token) const {
    const int E = config_.head_dim;
    for (int h = 0; norm != nullptr && h < num_heads; ++h) {
        float* x_E = x_HE + std::size_t(h) * E;
        kernels_.rmsnorm(x_E, norm, config_.norm_eps, E, x_E);
    }
    if (block.rope) kernels_.rope(x_HE, num_heads, E, rotary_.floats() + std::size_t(token) * E);
}

// Prepares the new queries and keys, in place, and puts keys and values into the caches. A thread takes some
// key/value heads of some tokens, and the queries that share them.
void Decoder::store(const Pass& pass, int index, int thread) {
    const Block& block = weights_.blocks[std::size_t(index)];
    const int E = config_.head_dim, G = config_.num_kv_heads, heads = config_.num_heads / G;
    for (const Run& run : pass.runs) {
        const Part part(run.count * G, thread, pool_.size());
        for (int i = part.begin; i < part.end; ++i) {
            const int head = i / run.count, t = run.first + i % run.count;
            float* q_HE = q_.floats() + t * q_stride_ + std::size_t(head) * heads * E;
            float* k_E = k_.floats() + t * kv_stride_ + std::size_t(head) * E;
            prepare_heads(block, q_HE, block.query_norm, heads, t);
            prepare_heads(block, k_E, block.key_norm, 1, t);
            run.cache->store(index, head, run.position + t - run.first, k_E,
                             v_.floats() + t * kv_stride_ + std::size_t(head) * E,
                             t + 1 == run.first + run.count);
        }
    }
}

void Decoder::attend_item(const Pass& pass, const AttentionItem& item, int index, int thread) {
    const Run& run = pass.runs[item.run];
    const int heads = config_.num_heads / config_.num_kv_heads;
    const std::size_t row = std::size_t(run.first + item.first) * q_stride_ +
                            std::size_t(item.head) * std::size_t(heads) * std::size_t(config_.head_dim);
    attention_.attention(
        {.layout = kv_,
         .chunks = run.cache->chunks(),
         .head_begin = run.cache->head_begin(index, item.head),
         .begin = item.begin,
         .end = item.end,
         .q = q_.floats() + row,
         .out = attended_.floats() + row,
         .stride = q_stride_,
         .num_tokens = item.count,
         .num_heads = heads,
         .position = run.position + item.first,
         .num_positions = run.position + run.count,
         .window = weights_.blocks[std::size_t(index)].window,
         .scale = float(1.0 / std::sqrt(double(config_.head_dim))),
         .state = item.state < 0 ? nullptr : attention_states_.data() + item.state,
         .scratch = attention_scratch_.floats() + thread * attention_scratch_floats_of_a_thread()});
}

// Writes the outputs of the tokens whose positions were split among items. The states of one chunk's rows, of
// all heads, follow each other; those of the next chunk come after them.
void Decoder::merge_states(const Pass& pass, const AttentionPlan& plan, int thread) {
    const int heads = config_.num_heads / config_.num_kv_heads, E = config_.head_dim;
    const std::size_t row = attention_state_floats(E);
    const auto is_split = [](const AttentionItem& item) { return item.state >= 0; };
    if (std::none_of(plan.items.begin(), plan.items.end(), is_split)) return;
    pool_.barrier();
    int index = 0;
    for (const AttentionItem& item : plan.items) {
        const Run& run = pass.runs[item.run];
        const int begin = first_chunk(run.position, plan.window);
        if (!is_split(item) || item.begin != begin || index++ % pool_.size() != thread) continue;
        for (int h = 0; h < heads; ++h) {
            merge_attention(
                attention_states_.data() + item.state + h * row, std::size_t(config_.num_heads) * row,
                num_chunks(run.position + run.count) - begin, E,
                attended_.floats() + run.first * q_stride_ + std::size_t(item.head * heads + h) * E);
        }
    }
}

std::vector<double> Decoder::time_attention(int context, int num_sequences, int repeats) {
    const int E = config_.head_dim, G = config_.num_kv_heads;
    Pass pass{};
    std::vector<KvCache> caches;
    for (int i = 0; i < num_sequences; ++i) {
        caches.push_back(new_cache(context));
        caches.back().reserve(context);
    }
    for (int i = 0; i < num_sequences; ++i) {
        pass.runs.push_back({&caches[i], i, 1, context - 1});
        pass.tokens.push_back({0, context - 1});
    }
    plan_attention(pass);
    const auto fill = [&](int thread) {
        std::vector<float> x(std::size_t(E) * 8);
        for (std::size_t e = 0; e < x.size(); ++e) x[e] = std::sin(float(e * e));
        const Part part(num_sequences * num_blocks() * G, thread, pool_.size());
        for (int i = part.begin; i < part.end; ++i) {
            for (int p = 0; p < context; ++p) {
                caches[i / G / num_blocks()].store(i / G % num_blocks(), i % G, p, x.data() + p * 5 % 7 * E,
                                                   x.data() + p * 3 % 7 * E, p + 1 == context);
            }
        }
        rotary_angles(pass, thread);
    };
    pool_.run(fill);
    std::fill_n(q_.floats(), num_sequences * q_stride_, 0.5f);
    std::fill_n(k_.floats(), num_sequences * kv_stride_, 0.5f);
    std::fill_n(v_.floats(), num_sequences * kv_stride_, 0.5f);
    std::vector<double> seconds;
    for (int i = 0; i < repeats; ++i) {
        const auto begin = std::chrono::steady_clock::now();
        pool_.run([&](int thread) {
            for (int index = 0; index < num_blocks(); ++index) {
                attend(pass, index, thread);
                pool_.barrier();
            }
        });
        seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
    }
    return seconds;
}

}  // namespace gossamer
