// What this machine can do at best: reading memory, and multiplying in registers.
//
// Every speed claim stands beside one of these, measured in the same run. The products are those of the
// level, in as many independent chains as hide the latency of an instruction.

#include <cstring>

#include "kernels/kernels.hpp"

namespace gossamer {

namespace scalar {

std::uint64_t read(const std::uint8_t* data, std::size_t count, std::size_t prefetch_bytes) {
    std::uint64_t sum = 0;
    for (std::size_t i = 0; i < count; i += kVectorBytes) {
        if (prefetch_bytes != 0) __builtin_prefetch(data + i + prefetch_bytes);
        std::uint64_t words[8];
        std::memcpy(words, data + i, sizeof words);
        for (std::uint64_t word : words) sum += word;
    }
    return sum;
}

std::uint64_t multiply_int8(std::uint64_t rounds) {
    std::int32_t chains[16] = {};
    for (std::uint64_t i = 0; i < rounds; ++i) {
        for (int c = 0; c < 16; ++c) {
            std::int32_t weight = c;
            __asm__ volatile("" : "+r"(weight));  // as if loaded
            chains[c] += weight * int(i & 255);
        }
    }
    __asm__ volatile("" : : "r"(chains) : "memory");
    return rounds * 16;
}

// A multiplication and an addition, which is what the products of this level take, of 4 numbers at a time:
// every processor that Gossamer runs on has such vectors.
std::uint64_t multiply_f32(std::uint64_t rounds) {
    using Four [[gnu::vector_size(16)]] = float;
    constexpr int kChains = 12;
    const Four weight = {0.5f, 0.5f, 0.5f, 0.5f}, input = {0.25f, 0.25f, 0.25f, 0.25f};
    Four chains[kChains];
    for (int c = 0; c < kChains; ++c)
        chains[c] = input * float(c);  // all different, or one would be computed
    for (std::uint64_t i = 0; i < rounds; ++i) {
        for (Four& chain : chains) chain = chain * weight + input;
    }
    __asm__ volatile("" : : "r"(chains) : "memory");
    return rounds * kChains * 4;
}

}  // namespace scalar

}  // namespace gossamer
