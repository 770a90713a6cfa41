// sums = W x of sparse weights as layout.py has them, and inputs in the order of its `fragments`.
//
// A warp does the steps of one panel, or a share of them, for up to 8 tiles of 8 tokens at once. A step is 32
// vectors of 16 rows x 4 inputs. Its weights are copied to a slot of shared memory while those before it are
// multiplied; lane L finds where those of vector L begin, and each lane then takes of a product what rows g
// and g + 8 have. Weights are expanded once for all tokens. A step of INT4 is a group of inputs, whose sums
// are multiplied before they are added.
//
// Each share has sums of its own, which are added in the order of the shares: floats too are the same each
// time.
#pragma once
#include "weights.cuh"

constexpr int kWarps = 4;  // of a block
constexpr int kSlots = 3;  // of a warp: one is read, two are on their way
constexpr int kTileTokens = 8;

template <class W>
constexpr int kTileWords = W::kProducts * kLanes * 2;  // of a step's inputs of a tile
template <class W>
constexpr int kWarpBytes = kSlots * kSlotBytes<W> + kStepVectors * kVectorBytes;
template <class W>
constexpr int kSharedBytes = kTableBytes<W> + kWarps * kWarpBytes<W>;

struct SparseProduct {
    const uint64_t* masks;        // [panels][steps][32]
    const uint8_t* values;        // in 16-byte blocks
    const uint32_t* starts;       // [panels * steps + 1]
    const uint16_t* multipliers;  // of INT4 [panels][steps][8]
    const uint32_t* inputs;       // [steps][tiles][products][32][2]
    void* sums;                   // int32 or float [shares][tiles * 8 tokens][panels * 16]
    int32_t panels, steps;
    int32_t shares;  // that a panel's steps are cut into, each a warp's
};

// sums += those of a step of INT4 times the multipliers of rows g and g + 8.
GOSSAMER_DEVICE void add_step(int32_t (&sums)[4], const int32_t (&sixteenfold)[4], uint32_t multipliers) {
    GOSSAMER_UNROLL
    for (int part = 0; part < 4; ++part) {
        const int32_t multiplier = part < 2 ? multipliers & 255 : multipliers >> 8;
        sums[part] += (sixteenfold[part] >> 4) * multiplier;
    }
}

template <class W, int kTiles>
GOSSAMER_DEVICE void sparse_product(const SparseProduct& job) {
    const int lane = thread_index() % kLanes;
    const int warp = thread_index() / kLanes;
    const int g = lane / 4;
    const int t = lane % 4;
    const uint32_t table = shared_memory();
    write_table<W>(table);

    const int unit = block_index() * kWarps + warp;
    if (unit >= job.panels * job.shares) return;
    const int panel = unit / job.shares, share = unit % job.shares;
    const int begin = static_cast<int64_t>(job.steps) * share / job.shares;
    const int end = static_cast<int64_t>(job.steps) * (share + 1) / job.shares;
    const int64_t first = static_cast<int64_t>(panel) * job.steps;  // step of the matrix
    const uint32_t* starts = job.starts + first;
    const uint64_t* masks = job.masks + first * kLanes + lane;
    const uint32_t* inputs = job.inputs + static_cast<int64_t>(begin) * kTiles * kTileWords<W> + lane * 2;
    const uint32_t slots = table + kTableBytes<W> + warp * kWarpBytes<W>;
    const uint32_t last_slot = slots + (kSlots - 1) * kSlotBytes<W>;
    const uint32_t vectors = slots + kSlots * kSlotBytes<W>;

    const auto copy = [&](int step, uint32_t slot) {
        if (step < end) copy_step<W>(job.values, starts, step, slot);
        commit_copies();
    };
    for (int ahead = 0; ahead < kSlots - 1; ++ahead) copy(begin + ahead, slots + ahead * kSlotBytes<W>);

    const Row row = W::row(g);
    typename W::Sum sums[kTiles][4] = {};
    uint64_t mask = begin < end ? masks[begin * kLanes] : 0;
    uint32_t slot = slots;
    for (int step = begin; step < end; ++step) {
        copy(step + kSlots - 1, slot == slots ? last_slot : slot - kSlotBytes<W>);
        const uint64_t own_mask = mask;
        if (step + 1 < end) mask = masks[(step + 1) * kLanes];
        uint32_t multipliers = 0;
        if constexpr (W::kRuns == 2) multipliers = job.multipliers[(first + step) * kStepMultipliers + g];
        const Vector vector = find_vector<W>(own_mask, slot, starts[step]);
        store_shared4(vectors + lane * kVectorBytes, vector);
        wait_copies<kSlots - 1>();
        sync_warp();
        typename W::Sum of_step[kTiles][4] = {};
        auto& to = W::kRuns == 1 ? sums : of_step;
        GOSSAMER_UNROLL
        for (int product = 0; product < W::kProducts; ++product) {
            uint32_t w[4];
            W::fragment(table, vectors, product, t, row, w);
            GOSSAMER_UNROLL
            for (int tile = 0; tile < kTiles; ++tile) {
                const uint32_t* x = inputs + (tile * W::kProducts + product) * kLanes * 2;
                multiply_add(to[tile], w, x[0], x[1]);
            }
        }
        if constexpr (W::kRuns == 2) {
            GOSSAMER_UNROLL
            for (int tile = 0; tile < kTiles; ++tile) add_step(sums[tile], of_step[tile], multipliers);
        }
        inputs += kTiles * kTileWords<W>;
        slot = slot == last_slot ? slots : slot + kSlotBytes<W>;
        sync_warp();
    }
    const int64_t rows = static_cast<int64_t>(job.panels) * 16;
    auto* to = static_cast<typename W::Sum*>(job.sums) + share * kTiles * kTileTokens * rows;
    GOSSAMER_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
        GOSSAMER_UNROLL
        for (int part = 0; part < 4; ++part) {
            const int token = tile * kTileTokens + 2 * t + part % 2;
            to[token * rows + panel * 16 + g + 8 * (part / 2)] = sums[tile][part];
        }
    }
}

GOSSAMER_KERNEL(kWarps* kLanes) sparse_i8_1(SparseProduct job) { sparse_product<Int8, 1>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_i8_2(SparseProduct job) { sparse_product<Int8, 2>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_i8_4(SparseProduct job) { sparse_product<Int8, 4>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_i8_8(SparseProduct job) { sparse_product<Int8, 8>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_i4_1(SparseProduct job) { sparse_product<Int4, 1>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_i4_2(SparseProduct job) { sparse_product<Int4, 2>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_i4_4(SparseProduct job) { sparse_product<Int4, 4>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_i4_8(SparseProduct job) { sparse_product<Int4, 8>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_bf16_1(SparseProduct job) { sparse_product<Bfloat16, 1>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_bf16_2(SparseProduct job) { sparse_product<Bfloat16, 2>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_bf16_4(SparseProduct job) { sparse_product<Bfloat16, 4>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_bf16_8(SparseProduct job) { sparse_product<Bfloat16, 8>(job); }
