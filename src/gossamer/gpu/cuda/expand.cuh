// All weights of a sparse matrix, zeros among them, for dense products of many tokens.
#pragma once
#include "weights.cuh"

constexpr int kExpandWarps = 4;  // of a block, each with a step

template <class W>
constexpr int kExpandBytes = kTableBytes<W> + kExpandWarps * kSlotBytes<W>;

struct Expand {
    const uint64_t* masks;        // [panels][steps][32]
    const uint8_t* values;        // in 16-byte blocks
    const uint32_t* starts;       // [panels * steps + 1]
    const uint16_t* multipliers;  // of INT4 [panels][steps][8]
    uint32_t* w;                  // int8 or bfloat16 [panels * 16][steps * 128]
    int32_t panels, steps;
};

// A lane writes the sixteen rows of a vector: a warp a row's 128 inputs at a time.
template <class W>
GOSSAMER_DEVICE void expand(const Expand& job) {
    const int lane = thread_index() % kLanes;
    const int warp = thread_index() / kLanes;
    const uint32_t table = shared_memory();
    write_table<W>(table);
    const int64_t step = static_cast<int64_t>(block_index()) * kExpandWarps + warp;
    if (step >= static_cast<int64_t>(job.panels) * job.steps) return;
    const uint32_t slot = table + kTableBytes<W> + warp * kSlotBytes<W>;
    const uint32_t* starts = job.starts + step;
    copy_step<W>(job.values, starts, 0, slot);
    commit_copies();
    const Vector vector = find_vector<W>(job.masks[step * kLanes + lane], slot, starts[0]);
    wait_copies<0>();
    sync_warp();
    const int64_t row_words = static_cast<int64_t>(job.steps) * kLanes * W::kWords;
    uint32_t* to = job.w + step / job.steps * 16 * row_words + (step % job.steps * kLanes + lane) * W::kWords;
    GOSSAMER_UNROLL
    for (int g = 0; g < 8; ++g) {
        uint32_t upper[W::kWords], lower[W::kWords];
        W::four(table, vector.x, vector.z, lane, W::row(g), upper);
        W::four(table, vector.y, vector.w, lane, W::row(g), lower);
        if constexpr (W::kRuns == 2) {
            const uint32_t two = job.multipliers[step * kStepMultipliers + g];
            upper[0] = multiplied(upper[0], two & 255);
            lower[0] = multiplied(lower[0], two >> 8);
        }
        GOSSAMER_UNROLL
        for (int word = 0; word < W::kWords; ++word) {
            to[g * row_words + word] = upper[word];
            to[(g + 8) * row_words + word] = lower[word];
        }
    }
}

GOSSAMER_KERNEL(kExpandWarps* kLanes) expand_i8(Expand job) { expand<Int8>(job); }
GOSSAMER_KERNEL(kExpandWarps* kLanes) expand_i4(Expand job) { expand<Int4>(job); }
GOSSAMER_KERNEL(kExpandWarps* kLanes) expand_bf16(Expand job) { expand<Bfloat16>(job); }
