// A block of GPU lanes on a CPU, for tests: the functions of src/gossamer/gpu/cuda/warp.cuh for lanes that
// take turns.
//
// A lane is a fiber. What lanes do together (shuffles, products, barriers) hands over to the next lane until
// all of the warp, or of the block, have come as far; which lane is next hangs on a seed. Shared memory
// begins as noise, and asynchronous copies arrive as late as the kernel's waits allow, or at once. Addresses
// are checked as the hardware checks them: a kernel that would fault ends the process and says why.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#define GOSSAMER_KERNEL(threads) static inline void
#define GOSSAMER_DEVICE inline
#define GOSSAMER_UNROLL
#define GOSSAMER_ROLLED

namespace emulation {

constexpr size_t kSharedBytes = 227 << 10;  // that a block may have
constexpr size_t kStackBytes = 128 << 10;
constexpr uint32_t kSharedStart = 1024;  // where a block's own begins, as behind what the system keeps

struct Copy {
    uint32_t shared;
    const void* global;
};

struct Lane {
    ucontext_t context;
    bool done = false;
    int passed = 0;  // exchanges
    uint64_t given[2] =
        {};  // to the exchanges under way: the next one may begin before all have read the last
    std::vector<std::vector<Copy>> copies;  // groups, the last one open
};

struct Block {
    int index = 0, current = 0;
    bool eager_copies = false;
    std::vector<Lane> lanes;
    std::vector<int> next;  // lane -> the one that has its turn after it
    size_t shared_bytes = 0;
    ucontext_t home;
    std::function<void()> kernel;
};

inline Block block;
alignas(128) inline char shared[kSharedStart + kSharedBytes];

[[noreturn]] inline void fault(const char* what) {
    std::fprintf(stderr, "block %d, thread %d: %s\n", block.index, block.current, what);
    std::exit(3);
}

inline char* at(uint32_t address, size_t bytes) {
    if (address % bytes != 0) fault("a misaligned address in shared memory");
    if (address < kSharedStart || address + bytes > kSharedStart + block.shared_bytes)
        fault("outside shared memory");
    return shared + address;
}

inline void hand_over() {
    const int self = block.current;
    int lane = block.next[self];
    while (block.lanes[lane].done && lane != self) lane = block.next[lane];
    if (lane == self) return;
    block.current = lane;
    swapcontext(&block.lanes[self].context, &block.lanes[lane].context);
}

// Gives `value` to all lanes from `begin` to `end` and returns when each of them has given one, or is done.
inline int exchange(uint64_t value, int begin, int end) {
    Lane& self = block.lanes[block.current];
    const int turn = self.passed % 2;
    self.given[turn] = value;
    const int mine = ++self.passed;
    for (;;) {
        bool all = true;
        for (int lane = begin; lane < end; ++lane)
            all &= block.lanes[lane].done || block.lanes[lane].passed >= mine;
        if (all) return turn;
        hand_over();
    }
}

inline int warp_begin() { return block.current / 32 * 32; }
inline int exchange_in_warp(uint64_t value) { return exchange(value, warp_begin(), warp_begin() + 32); }
inline uint32_t given(int lane, int turn) {
    return static_cast<uint32_t>(block.lanes[warp_begin() + lane].given[turn]);
}

inline void run_lane() {
    block.kernel();
    Lane& self = block.lanes[block.current];
    self.done = true;
    for (int lane = block.next[block.current]; lane != block.current; lane = block.next[lane]) {
        if (!block.lanes[lane].done) {
            block.current = lane;
            setcontext(&block.lanes[lane].context);
        }
    }
    setcontext(&block.home);
}

// Runs `kernel` for all lanes of all blocks, one block after another.
inline void launch(int blocks, int threads, size_t shared_bytes, unsigned seed, bool eager_copies,
                   std::function<void()> kernel) {
    std::mt19937 random(seed);
    std::vector<std::unique_ptr<char[]>> stacks(threads);
    for (auto& stack : stacks) stack = std::make_unique<char[]>(kStackBytes);
    std::vector<int> order(threads);
    block.kernel = std::move(kernel);
    block.shared_bytes = shared_bytes;
    block.eager_copies = eager_copies;
    for (block.index = 0; block.index < blocks; ++block.index) {
        for (size_t at = 0; at + 4 <= kSharedStart + shared_bytes; at += 4) {
            const auto noise = static_cast<uint32_t>(random());
            std::memcpy(shared + at, &noise, 4);
        }
        for (int lane = 0; lane < threads; ++lane) order[lane] = lane;
        if (seed != 0) std::shuffle(order.begin(), order.end(), random);
        block.next.assign(threads, 0);
        for (int lane = 0; lane < threads; ++lane) block.next[order[lane]] = order[(lane + 1) % threads];
        block.lanes = std::vector<Lane>(threads);
        for (int lane = 0; lane < threads; ++lane) {
            Lane& made = block.lanes[lane];
            made.copies.emplace_back();
            getcontext(&made.context);
            made.context.uc_stack.ss_sp = stacks[lane].get();
            made.context.uc_stack.ss_size = kStackBytes;
            made.context.uc_link = &block.home;
            makecontext(&made.context, run_lane, 0);
        }
        block.current = order[0];
        swapcontext(&block.home, &block.lanes[order[0]].context);
    }
}

// What a group's copies bring; only then do they read the global memory.
inline void arrive(const std::vector<Copy>& group) {
    for (const Copy& copy : group) std::memcpy(at(copy.shared, 16), copy.global, 16);
}

}  // namespace emulation

inline int thread_index() { return emulation::block.current; }
inline int block_index() { return emulation::block.index; }
inline uint32_t shared_memory() { return emulation::kSharedStart; }

template <int kOffset = 0>
uint32_t load_shared(uint32_t address) {
    uint32_t value;
    std::memcpy(&value, emulation::at(address + kOffset, 4), 4);
    return value;
}

template <int kOffset = 0>
Word4 load_shared4(uint32_t address) {
    Word4 value;
    std::memcpy(&value, emulation::at(address + kOffset, 16), 16);
    return value;
}

inline void store_shared(uint32_t address, uint32_t value) {
    std::memcpy(emulation::at(address, 4), &value, 4);
}
inline void store_shared4(uint32_t address, Word4 value) {
    std::memcpy(emulation::at(address, 16), &value, 16);
}

inline void copy_to_shared(uint32_t shared, const void* global) {
    if (reinterpret_cast<uintptr_t>(global) % 16 != 0)
        emulation::fault("a misaligned copy from global memory");
    const emulation::Copy copy{shared, global};
    if (emulation::block.eager_copies) {
        emulation::arrive({copy});
    } else {
        emulation::block.lanes[emulation::block.current].copies.back().push_back(copy);
    }
}

inline void commit_copies() { emulation::block.lanes[emulation::block.current].copies.emplace_back(); }

template <int kOpen>
void wait_copies() {
    auto& groups = emulation::block.lanes[emulation::block.current].copies;
    while (groups.size() > kOpen + 1) {
        emulation::arrive(groups.front());
        groups.erase(groups.begin());
    }
}

inline void sync_warp() { emulation::exchange_in_warp(0); }
inline void sync_block() { emulation::exchange(0, 0, static_cast<int>(emulation::block.lanes.size())); }

inline uint32_t shuffle_up(uint32_t value, int by) {
    const int lane = thread_index() % 32, turn = emulation::exchange_in_warp(value);
    return emulation::given(lane >= by ? lane - by : lane, turn);
}

inline uint32_t shuffle_xor(uint32_t value, int by) {
    const int lane = thread_index() % 32, turn = emulation::exchange_in_warp(value);
    return emulation::given(lane ^ by, turn);
}

inline int popcount(uint32_t value) { return __builtin_popcount(value); }

inline uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
    return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (shift % 32));
}

inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
    uint32_t chosen = 0;
    for (int place = 0; place < 4; ++place) {
        chosen |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * place & 7) & 255) << 8 * place;
    }
    return chosen;
}

inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bits;
}

inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

inline float divide(float a, float b) { return a / b; }
inline float multiply(float a, float b) { return a * b; }
inline float to_float(int32_t value) { return static_cast<float>(value); }
inline int32_t round_to_even(float value) { return static_cast<int32_t>(std::nearbyintf(value)); }

namespace emulation {

// The words of a product's fragments, six a lane, from all lanes of the warp.
struct Fragments {
    uint32_t words[6][32];
};

inline Fragments exchanged(const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const uint32_t mine[6] = {a[0], a[1], a[2], a[3], b0, b1};
    Fragments all;
    for (int word = 0; word < 6; ++word) {
        const int turn = exchange_in_warp(mine[word]);
        for (int lane = 0; lane < 32; ++lane) all.words[word][lane] = given(lane, turn);
    }
    return all;
}

// c [16 x 8] += a b, both fragments of words that hold `per_word` inputs. Of a, word r of lane 4 g + t has
// row g
// + 8 (r mod 2) and the inputs of word t of half r / 2; of b, word r has those of half r, column g; of c,
// number i has row g + 8 (i / 2) and column 2 t + i mod 2.
template <class Number, class OfWord>
void add_products(Number (&c)[4], const Fragments& all, int per_word, OfWord of_word) {
    const int g = thread_index() % 32 / 4, t = thread_index() % 4;
    for (int number = 0; number < 4; ++number) {
        const int row = g + 8 * (number / 2), column = 2 * t + number % 2;
        for (int half = 0; half < 2; ++half) {
            for (int word = 0; word < 4; ++word) {
                const uint32_t weights = all.words[row / 8 + 2 * half][row % 8 * 4 + word];
                const uint32_t inputs = all.words[4 + half][column * 4 + word];
                for (int k = 0; k < per_word; ++k) c[number] += of_word(weights, k) * of_word(inputs, k);
            }
        }
    }
}

}  // namespace emulation

// m16n8k32 of signed bytes.
inline void multiply_add(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto byte = [](uint32_t word, int index) { return static_cast<int8_t>(word >> 8 * index); };
    emulation::add_products(c, emulation::exchanged(a, b0, b1), 4, byte);
}

// m16n8k16 of bfloat16.
inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    const auto number = [](uint32_t word, int index) { return float_of(word >> 16 * index << 16); };
    emulation::add_products(c, emulation::exchanged(a, b0, b1), 2, number);
}
