// Weights of a panel as whole vectors: the one place that knows how sparse streams and int4 pairs are stored.
//
// A sparse panel is groups of 16 masks and then the values under their bits; a pair of int4 vectors A, B
// shares its bytes, A's weights in the low nibbles. Of a panel of blocks, masks and values are of rows.
// `scalar::expand` is the specification; x86/expand_avx2.hpp and x86/expand_avx512.hpp do the same with
// vectors.
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "base/view.hpp"

namespace gossamer {

// body(0), ... body(N - 1) with constant indices, so that arrays of accumulators stay in registers: GCC 12
// unrolls loops of more than some 16 turns too late for that.
template <int N, class Body>
[[gnu::always_inline]] inline void unrolled(Body body) {
    const auto all = [&]<int... I>(std::integer_sequence<int, I...>)
                         __attribute__((always_inline)) { (body(std::integral_constant<int, I>()), ...); };
    all(std::make_integer_sequence<int, N>());
}

// A panel's run of vectors that is expanded at a time: whole multiplier groups, 8 KiB.
constexpr int kChunkVectors = 128;

// Tokens that share one expansion of the weights.
constexpr int kSuperBlock = 256;

// A mask as a number.
template <Values kValues>
using Mask =
    std::conditional_t<bytes_per_mask(kValues) == 2, std::uint16_t,
                       std::conditional_t<bytes_per_mask(kValues) == 4, std::uint32_t, std::uint64_t>>;

template <class T>
T load_as(const std::uint8_t* bytes) {
    T value;
    std::memcpy(&value, bytes, sizeof value);
    return value;
}

// How `expand` of a level may be left out: dense vectors lie in the file as kernels want them.
constexpr bool lies_expanded(Values values, Storage storage) {
    return storage == Storage::dense && values != Values::i4;
}

// Expands the next `count` vectors of a panel of blocks to `out` [count][64]; returns the position after
// them. `count` is a multiple of kStripVectors, or all that are left.
inline const std::uint8_t* expand_blocks(const std::uint8_t* position, int count, std::uint8_t* out) {
    std::memset(out, 0, std::size_t(count) * kVectorBytes);
    for (int first = 0; first < count; first += kStripVectors, out += kStripVectors * kVectorBytes) {
        const std::uint8_t* masks = position;
        position += kPanelRows * sizeof(std::uint64_t);
        for (int row = 0; row < kPanelRows; ++row) {
            auto mask = load_as<std::uint64_t>(masks + row * sizeof(std::uint64_t));
            for (; mask != 0; mask &= mask - 1, position += kBlockBytes)
                std::memcpy(out + std::countr_zero(mask) * kVectorBytes + row * kBlockBytes, position, 4);
        }
    }
    return position;
}

namespace scalar {

// Expands the next `count` vectors of a panel, from `position` in its data and `multipliers` (i4: those of
// the first vector), to `out` [count][64]; returns the position after them. `count` is a multiple of 32, or
// all that are left.
template <Values kValues, Storage kStorage>
const std::uint8_t* expand(const std::uint8_t* position, const std::uint8_t* multipliers, int count,
                           std::uint8_t* out) {
    if constexpr (kStorage == Storage::blocks) return expand_blocks(position, count, out);
    constexpr int kWeights = 16 * inputs_per_vector(kValues), kBytes = bytes_per_value(kValues);
    const auto masks = [&](int first, int v) -> Mask<kValues> {
        if (kStorage == Storage::dense) return Mask<kValues>(~std::uint64_t(0));
        return load_as<Mask<kValues>>(position + std::size_t(v - first) * sizeof(Mask<kValues>));
    };
    std::memset(out, 0, std::size_t(count) * kVectorBytes);
    for (int first = 0; first < count; first += kGroupVectors) {
        const int end = std::min(first + kGroupVectors, count);
        const std::uint8_t* values = position;
        if (kStorage == Storage::sparse) values += std::size_t(end - first) * sizeof(Mask<kValues>);
        for (int v = first; v < end; ++v) {
            const Mask<kValues> mask = masks(first, v);
            const std::uint8_t* next = values;
            for (int bit = 0; bit < kWeights; ++bit) {
                if (!(mask >> bit & 1)) continue;
                std::uint8_t* weight = out + std::size_t(v) * kVectorBytes + bit * kBytes;
                if constexpr (kValues == Values::i4) {
                    const int nibble = v % 2 ? *next >> 4 : *next & 15;
                    const int multiplier = multipliers[v / kScaleVectors * kPanelRows + bit / 4];
                    *weight = std::uint8_t(((nibble ^ 8) - 8) * multiplier);
                } else {
                    std::memcpy(weight, next, kBytes);
                }
                next += kBytes;
            }
            if (kValues != Values::i4) {
                values = next;
            } else if (v % 2 || v == end - 1) {  // the pair ends
                const Mask<kValues> other = v % 2 ? masks(first, v - 1) : Mask<kValues>(0);
                values += std::max(std::popcount(mask), std::popcount(other));
            }
        }
        position = values;
    }
    return position;
}

}  // namespace scalar

}  // namespace gossamer
