// How a lane gets four weights of a row from a vector's mask and the packed weights behind it, of each type.
//
// A nibble of the mask is a row's four weights. `rows_before` has the bits of its half of the mask before the
// nibble, which say where its weights begin; turned right by `to_entry` the half has the nibble's entry of
// the table. Reads of whole words, moved right by the place's rest, have the up to four weights, and
// permutations put them where the nibble has bits, zeros elsewhere.
#pragma once
#include "warp.cuh"

constexpr int kStepVectors = 32;
constexpr int kStepWeights = kStepVectors * 64;
constexpr int kCopyBytes = 16;
constexpr int kNibbles = 16;

// A vector in shared memory: its mask, and the byte addresses of the weights of rows 0 and 8.
using Vector = Word4;
constexpr int kVectorBytes = 16;

// Rows g and g + 8 of a vector, as the instruction's fragments want them.
struct Row {
    uint32_t rows_before;
    int to_entry;
};

// INT8; with two runs INT4, of which the vectors of a step's first half have the low nibbles of its bytes and
// those of the second the high ones. A nibble comes out as the upper half of a byte: sixteen times as large.
template <int kRunsOfStep>
struct Integers {
    using Sum = int32_t;
    static constexpr int kRuns = kRunsOfStep;  // of vectors, which share bytes
    static constexpr int kBytes = 1;
    static constexpr int kWords = 1;     // that four weights take
    static constexpr int kProducts = 4;  // of a step, of 16 x 32 weights
    static constexpr int kEntryBytes = 4;

    // Which byte of the weights goes to each place of a nibble: its n-th bit takes the n-th; 4 is a byte of
    // zeros.
    static GOSSAMER_DEVICE void write_entry(uint32_t table, int nibble) {
        uint32_t selector = 0;
        uint32_t next = 0;
        for (int place = 0; place < 4; ++place) {
            const bool live = (nibble >> place) & 1;
            selector |= (live ? next : 4) << (4 * place);
            next += live;
        }
        store_shared(table + nibble * kEntryBytes, selector);
    }

    static GOSSAMER_DEVICE Row row(int g) { return {(1u << (4 * g)) - 1, (4 * g + 30) % 32}; }

    static GOSSAMER_DEVICE void four(uint32_t table, uint32_t half, uint32_t at, int vector, Row row,
                                     uint32_t (&w)[kWords]) {
        at += popcount(half & row.rows_before);
        const uint32_t selector = load_shared(table | (funnel_right(half, half, row.to_entry) & 0x3c));
        const uint32_t word = at & ~3u;
        const uint32_t bits = at * 8 + (has_low_nibbles(vector) ? 4 : 0);
        w[0] = permute_bytes(funnel_right(load_shared(word), load_shared<4>(word), bits), 0, selector);
        if (kRuns == 2) w[0] &= 0xf0f0f0f0u;
    }

    // Their place is that of the byte before: four bits on, a low nibble is the upper half of a byte.
    static GOSSAMER_DEVICE bool has_low_nibbles(int vector) {
        return kRuns == 2 && vector < kStepVectors / 2;
    }

    // A product takes eight vectors: lane (g, t) the words of vectors t and t + 4.
    static GOSSAMER_DEVICE void fragment(uint32_t table, uint32_t vectors, int product, int t, Row row,
                                         uint32_t (&w)[4]) {
        const int number = 8 * product + t;
        const Vector left = load_shared4(vectors + number * kVectorBytes);
        const Vector right = load_shared4(vectors + (number + 4) * kVectorBytes);
        uint32_t word[4][1];
        four(table, left.x, left.z, number, row, word[0]);
        four(table, left.y, left.w, number, row, word[1]);
        four(table, right.x, right.z, number + 4, row, word[2]);
        four(table, right.y, right.w, number + 4, row, word[3]);
        GOSSAMER_UNROLL
        for (int part = 0; part < 4; ++part) w[part] = word[part][0];
    }
};
using Int8 = Integers<1>;
using Int4 = Integers<2>;

struct Bfloat16 {
    using Sum = float;
    static constexpr int kRuns = 1;
    static GOSSAMER_DEVICE bool has_low_nibbles(int /*vector*/) { return false; }
    static constexpr int kBytes = 2;
    static constexpr int kWords = 2;
    static constexpr int kProducts = 8;  // of 16 x 16 weights
    static constexpr int kEntryBytes = 8;

    // Bytes of places 0 and 1 in the entry's low half, of 2 and 3 in its high one, and which of the latter
    // stay: of the eight bytes that a permutation chooses from, none needs to be zero.
    static GOSSAMER_DEVICE void write_entry(uint32_t table, int nibble) {
        uint32_t selector = 0, kept = 0;
        uint32_t next = 0;
        for (int place = 0; place < 4; ++place) {
            const bool live = (nibble >> place) & 1;
            const uint32_t from = live ? next : place < 2 ? 2 : 0;
            selector |= (2 * from | (2 * from + 1) << 4) << (8 * place);
            next += live;
            if (place >= 2 && live) kept |= 0xffffu << (16 * (place - 2));
        }
        store_shared(table + nibble * kEntryBytes, selector);
        store_shared(table + nibble * kEntryBytes + 4, kept);
    }

    static GOSSAMER_DEVICE Row row(int g) { return {(1u << (4 * g)) - 1, (4 * g + 29) % 32}; }

    static GOSSAMER_DEVICE void four(uint32_t table, uint32_t half, uint32_t at, int /*vector*/, Row row,
                                     uint32_t (&w)[kWords]) {
        at += 2 * popcount(half & row.rows_before);
        const uint32_t entry = table | (funnel_right(half, half, row.to_entry) & 0x78);
        const uint32_t selector = load_shared(entry);
        const uint32_t word = at & ~3u;
        const uint32_t middle = load_shared<4>(word);
        const uint32_t first = funnel_right(load_shared(word), middle, at * 8);
        const uint32_t second = funnel_right(middle, load_shared<8>(word), at * 8);
        w[0] = permute_bytes(first, 0, selector);
        w[1] = permute_bytes(first, second, selector >> 16) & load_shared<4>(entry);
    }

    // A product takes four vectors. Its instruction has inputs 2 t, 2 t + 1, 2 t + 8, 2 t + 9 in lane t;
    // which input has which place does not matter to a sum, so that the lane gives it 4 t .. 4 t + 3, of both
    // sides.
    static GOSSAMER_DEVICE void fragment(uint32_t table, uint32_t vectors, int product, int t, Row row,
                                         uint32_t (&w)[4]) {
        const int number = 4 * product + t;
        const Vector vector = load_shared4(vectors + number * kVectorBytes);
        uint32_t upper[2], lower[2];
        four(table, vector.x, vector.z, number, row, upper);
        four(table, vector.y, vector.w, number, row, lower);
        w[0] = upper[0], w[1] = lower[0], w[2] = upper[1], w[3] = lower[1];
    }
};

// The multipliers of a panel's rows in a step: row g's in the low byte, that of row g + 8 above it.
constexpr int kStepMultipliers = 8;

// Four nibbles, each the upper half of a byte, times a whole number from 1 to 16, as int8.
GOSSAMER_DEVICE uint32_t multiplied(uint32_t nibbles, uint32_t multiplier) {
    const uint32_t raised = (nibbles >> 4 ^ 0x08080808u) * multiplier;  // by 8 multipliers: from 0 to 240
    const uint32_t by = 0x08080808u * multiplier;
    return ((raised | 0x80808080u) - (by & 0x7f7f7f7fu)) ^ (~(raised ^ by) & 0x80808080u);
}

// A step's weights in shared memory, from any byte of the first 16 on, and the reads beyond them; ahead of
// them what low nibbles are read with.
template <class W>
constexpr int kAheadBytes = W::kRuns == 1 ? 0 : 16;
template <class W>
constexpr int kSlotBytes = kAheadBytes<W> + kStepWeights * W::kBytes / W::kRuns + 32;

template <class W>
constexpr int kTableBytes = kNibbles * W::kEntryBytes;

template <class W>
GOSSAMER_DEVICE void write_table(uint32_t table) {
    if (thread_index() < kNibbles) W::write_entry(table, thread_index());
    sync_block();
}

// Begins to copy a step's weights to `slot`, in whole pieces of 16 bytes.
template <class W>
GOSSAMER_DEVICE void copy_step(const uint8_t* values, const uint32_t* starts, int step, uint32_t slot) {
    const int lane = thread_index() % kLanes;
    const uint32_t from = starts[step] & ~(kCopyBytes / W::kBytes - 1);
    const uint32_t size = (starts[step + 1] - from) * W::kBytes;
    const uint8_t* begin = values + static_cast<uint64_t>(from) * W::kBytes;
    GOSSAMER_ROLLED
    for (uint32_t at = lane * kCopyBytes; at < size; at += kLanes * kCopyBytes)
        copy_to_shared(slot + kAheadBytes<W> + at, begin + at);
}

// The lane's vector, of `mask`, of a step whose weights lie in `slot` and begin at number `start` of all.
template <class W>
GOSSAMER_DEVICE Vector find_vector(uint64_t mask, uint32_t slot, uint32_t start) {
    const int lane = thread_index() % kLanes;
    const uint32_t upper = static_cast<uint32_t>(mask);  // rows 0 to 7
    const uint32_t lower = static_cast<uint32_t>(mask >> 32);
    const uint32_t num_upper = popcount(upper);
    const uint32_t num = num_upper + popcount(lower);
    uint32_t ends = num;
    GOSSAMER_UNROLL
    for (int by = 1; by < kStepVectors / W::kRuns; by *= 2) {
        const uint32_t before = shuffle_up(ends, by);
        if (lane % (kStepVectors / W::kRuns) >= by) ends += before;
    }
    const uint32_t begin = slot + kAheadBytes<W> - (W::has_low_nibbles(lane) ? 1 : 0);
    const uint32_t at = begin + W::kBytes * (start % (kCopyBytes / W::kBytes) + ends - num);
    return {upper, lower, at, at + W::kBytes * num_upper};
}
