// sums = W x of sparse INT8 weights as layout.py has them, and inputs in the order of its `fragments`.
//
// A warp does the steps of one panel, or a share of them, for up to 8 tiles of 8 tokens at once. A step is 32
// vectors of 16 rows x 4 inputs: four products of 16 x 32 weights with 32 x 8 inputs. Lane 4 g + t takes of a
// product the weights of rows g and g + 8 of its vectors t and t + 4: a nibble of the vector's mask each.
//
// The weights of a step are copied to a slot of shared memory while those before it are multiplied. Lane L
// counts vector L, so that each finds where its nibble's weights begin: one read of eight bytes, moved right
// by the place's rest, has the up to four weights, and one permutation puts them where the nibble has bits,
// zeros elsewhere.
#pragma once
#include "warp.cuh"

constexpr int kWarps = 4;  // of a block
constexpr int kSlots = 3;  // of a warp: one is read, two are on their way
constexpr int kTileTokens = 8;
constexpr int kProducts = 4;                        // of a step
constexpr int kTileWords = kProducts * kLanes * 2;  // of a step's inputs of a tile
constexpr int kSlotBytes = 2048 + 32;     // a step's weights, from any byte of 16, and the read beyond them
constexpr int kPlaceBytes = kLanes * 16;  // of a step's vectors: masks and where the weights are
constexpr int kWarpBytes = kSlots * kSlotBytes + kPlaceBytes;
constexpr int kSelectorBytes = 16 * 4;
constexpr int kSharedBytes = kSelectorBytes + kWarps * kWarpBytes;

struct SparseI8 {
    const uint64_t* masks;   // [panels][steps][32]
    const uint8_t* values;   // of 16-byte blocks
    const uint32_t* starts;  // [panels * steps + 1]
    const uint32_t* inputs;  // [steps][tiles][4][32][2]
    int32_t* sums;           // [tiles * 8 tokens][panels * 16], zeros before
    int32_t panels, steps;
    int32_t shares;  // that a panel's steps are cut into, each a warp's
};

// Which byte of the weights goes to each place of a nibble: its n-th bit takes the n-th; 4 is a byte of
// zeros.
GOSSAMER_DEVICE uint32_t selector_of(int nibble) {
    uint32_t selector = 0;
    uint32_t next = 0;
    for (int place = 0; place < 4; ++place) {
        const bool live = (nibble >> place) & 1;
        selector |= (live ? next : 4) << (4 * place);
        next += live;
    }
    return selector;
}

template <int kTiles>
GOSSAMER_DEVICE void sparse_i8(const SparseI8& job) {
    const int lane = thread_index() % kLanes;
    const int warp = thread_index() / kLanes;
    const int g = lane / 4;
    const int t = lane % 4;
    const uint32_t selectors = shared_memory();
    if (thread_index() < 16) store_shared(selectors + 4 * thread_index(), selector_of(thread_index()));
    sync_block();

    const int share = block_index() * kWarps + warp;
    if (share >= job.panels * job.shares) return;
    const int panel = share / job.shares;
    const int begin = static_cast<int64_t>(job.steps) * (share % job.shares) / job.shares;
    const int end = static_cast<int64_t>(job.steps) * (share % job.shares + 1) / job.shares;
    const int64_t first = static_cast<int64_t>(panel) * job.steps;  // step of the matrix
    const uint32_t* starts = job.starts + first;
    const uint64_t* masks = job.masks + first * kLanes + lane;
    const uint32_t* inputs = job.inputs + static_cast<int64_t>(begin) * kTiles * kTileWords + lane * 2;
    const uint32_t slots = selectors + kSelectorBytes + warp * kWarpBytes;
    const uint32_t last_slot = slots + (kSlots - 1) * kSlotBytes;
    const uint32_t places = slots + kSlots * kSlotBytes;

    const auto copy = [&](int step, uint32_t slot) {
        if (step < end) {
            const uint32_t from = starts[step] & ~15u;
            const uint32_t size = starts[step + 1] - from;
            GOSSAMER_ROLLED
            for (uint32_t at = lane * 16; at < size; at += kLanes * 16)
                copy_to_shared(slot + at, job.values + from + at);
        }
        commit_copies();
    };
    for (int ahead = 0; ahead < kSlots - 1; ++ahead) copy(begin + ahead, slots + ahead * kSlotBytes);

    const uint32_t rows_before = (1u << (4 * g)) - 1;
    const int to_offset = (4 * g + 30) % 32;  // turns nibble g into the offset of its selector
    // The four bytes that `half`, the mask of 8 rows of a vector whose weights begin at `at`, has in row g.
    const auto expanded = [&](uint32_t half, uint32_t at) {
        at += popcount(half & rows_before);
        const uint32_t selector = load_shared(selectors | (funnel_right(half, half, to_offset) & 0x3c));
        const uint32_t word = at & ~3u;
        return permute_bytes(funnel_right(load_shared(word), load_shared<4>(word), at * 8), 0, selector);
    };

    int32_t sums[kTiles][4] = {};
    uint64_t mask = begin < end ? masks[begin * kLanes] : 0;
    uint32_t slot = slots;
    for (int step = begin; step < end; ++step) {
        copy(step + kSlots - 1, slot == slots ? last_slot : slot - kSlotBytes);
        const uint32_t upper = static_cast<uint32_t>(mask);  // rows 0 to 7
        const uint32_t lower = static_cast<uint32_t>(mask >> 32);
        if (step + 1 < end) mask = masks[(step + 1) * kLanes];
        const uint32_t num_upper = popcount(upper);
        const uint32_t num = num_upper + popcount(lower);
        uint32_t ends = num;
        GOSSAMER_UNROLL
        for (int by = 1; by < kLanes; by *= 2) {
            const uint32_t before = shuffle_up(ends, by);
            if (lane >= by) ends += before;
        }
        const uint32_t at = slot + starts[step] % 16 + ends - num;
        store_shared4(places + lane * 16, Word4{upper, lower, at, at + num_upper});
        wait_copies<kSlots - 1>();
        sync_warp();
        GOSSAMER_UNROLL
        for (int product = 0; product < kProducts; ++product) {
            const Word4 left = load_shared4(places + (8 * product + t) * 16);
            const Word4 right = load_shared4(places + (8 * product + t + 4) * 16);
            const uint32_t w[4] = {expanded(left.x, left.z), expanded(left.y, left.w),
                                   expanded(right.x, right.z), expanded(right.y, right.w)};
            GOSSAMER_UNROLL
            for (int tile = 0; tile < kTiles; ++tile) {
                const uint32_t* x = inputs + (tile * kProducts + product) * kLanes * 2;
                multiply_add(sums[tile], w, x[0], x[1]);
            }
        }
        inputs += kTiles * kTileWords;
        slot = slot == last_slot ? slots : slot + kSlotBytes;
        sync_warp();
    }
    const int64_t rows = static_cast<int64_t>(job.panels) * 16;
    GOSSAMER_UNROLL
    for (int tile = 0; tile < kTiles; ++tile) {
        GOSSAMER_UNROLL
        for (int part = 0; part < 4; ++part) {
            const int token = tile * kTileTokens + 2 * t + part % 2;
            add_global(job.sums + token * rows + panel * 16 + g + 8 * (part / 2), sums[tile][part]);
        }
    }
}

GOSSAMER_KERNEL(kWarps* kLanes) sparse_i8_1(SparseI8 job) { sparse_i8<1>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_i8_2(SparseI8 job) { sparse_i8<2>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_i8_4(SparseI8 job) { sparse_i8<4>(job); }
GOSSAMER_KERNEL(kWarps* kLanes) sparse_i8_8(SparseI8 job) { sparse_i8<8>(job); }
