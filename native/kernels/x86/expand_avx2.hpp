// Weights of a panel as whole vectors, by AVX2: see ../expand.hpp.
//
// There is no instruction that expands, so weights are placed 8 at a time by a byte shuffle, which a table
// has for each of the 256 mask bytes (2 KiB, in the L1 cache).
#pragma once

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/expand.hpp"
#include "kernels/x86/target.hpp"

namespace gossamer {

// For each mask byte, the shuffle that puts values 0, 1, ... where the bits are, and zeros (0x80) elsewhere.
struct ByteShuffles {
    alignas(64) std::uint8_t control[256][8];
    alignas(64) std::uint8_t control_high[256][8];  // from the high half of 16 bytes
    constexpr ByteShuffles() : control(), control_high() {
        for (int mask = 0; mask < 256; ++mask) {
            int next = 0;
            for (int bit = 0; bit < 8; ++bit) {
                control[mask][bit] = mask >> bit & 1 ? next++ : 0x80;
                control_high[mask][bit] = control[mask][bit] + 8;
            }
        }
    }
};
inline constexpr ByteShuffles kByteShuffles;

}  // namespace gossamer

GOSSAMER_BEGIN_AVX2
namespace gossamer::avx2 {

// 8 weights of 4 or 2 bytes at `values` under the bits of a mask byte, to `out`.
template <Values kValues>
inline void expand_byte(std::uint8_t mask, const std::uint8_t* values, std::uint8_t* out) {
    const __m128i control = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kByteShuffles.control[mask]));
    if constexpr (kValues == Values::f32) {
        const __m256i lanes = _mm256_cvtepi8_epi32(control);
        const __m256i loaded = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
        const __m256i moved = _mm256_permutevar8x32_epi32(loaded, lanes);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                            _mm256_andnot_si256(_mm256_srai_epi32(lanes, 31), moved));
    } else {
        const __m128i twice = _mm_adds_epu8(_mm_unpacklo_epi8(control, control),
                                            _mm_unpacklo_epi8(control, control));  // 0x80 saturates: zero
        const __m128i bytes = _mm_adds_epu8(twice, _mm_set1_epi16(0x0100));
        const __m128i loaded = _mm_loadu_si128(reinterpret_cast<const __m128i*>(values));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(loaded, bytes));
    }
}

// 16 weights of a byte each, under two mask bytes: those at `low` and those at `high`.
inline void expand_two_bytes(const std::uint8_t* masks, const std::uint8_t* low, const std::uint8_t* high,
                             std::uint8_t* out) {
    const auto join = [](const std::uint8_t* first, const std::uint8_t* second) {
        const __m128d lower = _mm_load_sd(reinterpret_cast<const double*>(first));
        return _mm_castpd_si128(_mm_loadh_pd(lower, reinterpret_cast<const double*>(second)));
    };
    const __m128i control = join(kByteShuffles.control[masks[0]], kByteShuffles.control_high[masks[1]]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_shuffle_epi8(join(low, high), control));
}

// In each byte of a mask, the number of ones in the bytes below it.
inline std::uint64_t ones_below(std::uint64_t mask) {
    std::uint64_t ones = mask - (mask >> 1 & 0x5555555555555555u);
    ones = (ones & 0x3333333333333333u) + (ones >> 2 & 0x3333333333333333u);
    ones = (ones + (ones >> 4)) & 0x0F0F0F0F0F0F0F0Fu;
    return ones * 0x0101010101010101u << 8;
}

// One vector, its values packed at `values` and its mask at `masks`, to `out` [64]; returns its number of
// values.
template <Values kValues>
inline int expand_vector(const std::uint8_t* masks, const std::uint8_t* values, std::uint8_t* out) {
    constexpr int kBytes = bytes_per_value(kValues), kMaskBytes = bytes_per_mask(kValues);
    const auto mask = load_as<Mask<kValues>>(masks);
    const std::uint64_t below = ones_below(mask);
    std::uint8_t skip[8];
    std::memcpy(skip, &below, sizeof skip);
    if constexpr (kBytes == 1) {
        for (int i = 0; i < kMaskBytes; i += 2)
            expand_two_bytes(masks + i, values + skip[i], values + skip[i + 1], out + 8 * i);
    } else {
        for (int i = 0; i < kMaskBytes; ++i)
            expand_byte<kValues>(masks[i], values + std::size_t(skip[i]) * kBytes, out + 8 * i * kBytes);
    }
    return skip[kMaskBytes - 1] + std::popcount(masks[kMaskBytes - 1]);
}

// int8 weights q4 * multiplier of the rows in one half of a vector; `bytes` has q4 in its high nibbles.
inline __m256i multiply_rows(__m256i bytes, const std::uint8_t* multipliers) {
    const __m128i rows = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(multipliers));
    const __m256i factors =
        _mm256_mullo_epi32(_mm256_cvtepu8_epi32(rows), _mm256_set1_epi32(0x00100010));  // 16 m, twice
    const __m256i q = _mm256_and_si256(bytes, _mm256_set1_epi8(char(0xF0)));            // 16 q4
    const __m256i even = _mm256_mulhi_epi16(_mm256_slli_epi16(q, 8), factors);
    const __m256i odd = _mm256_mulhi_epi16(_mm256_and_si256(q, _mm256_set1_epi16(-256)), factors);
    return _mm256_or_si256(_mm256_and_si256(even, _mm256_set1_epi16(255)), _mm256_slli_epi16(odd, 8));
}

// A pair's bytes, `first` and `second` [64] (the same for a dense pair), to int8 weights in two vectors.
inline void finish_pair(const std::uint8_t* first, const std::uint8_t* second, const std::uint8_t* rows,
                        std::uint8_t* out, bool has_second) {
    for (int half = 0; half < 2; ++half) {
        const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(first) + half);
        const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(second) + half);
        auto* place = reinterpret_cast<__m256i*>(out) + half;
        _mm256_storeu_si256(place, multiply_rows(_mm256_slli_epi16(low, 4), rows + 8 * half));
        if (has_second) _mm256_storeu_si256(place + 2, multiply_rows(high, rows + 8 * half));
    }
}

// A group of `count` int4 vectors. All are expanded before any is loaded again: a load from two fresh stores
// waits for both.
template <Storage kStorage>
const std::uint8_t* expand_group_i4(const std::uint8_t* position, const std::uint8_t* rows, int count,
                                    std::uint8_t* out) {
    const std::uint8_t* masks = position;
    if (kStorage == Storage::sparse) {
        position += 8 * count;
        for (int v = 0; v < count; v += 2) {
            int used = expand_vector<Values::i4>(masks + 8 * v, position, out + v * kVectorBytes);
            if (v + 1 < count)
                used = std::max(used, expand_vector<Values::i4>(masks + 8 * v + 8, position,
                                                                out + (v + 1) * kVectorBytes));
            position += used;
        }
    }
    for (int v = 0; v < count; v += 2) {
        std::uint8_t* pair = out + v * kVectorBytes;
        const bool has_second = v + 1 < count;
        if (kStorage == Storage::sparse) {
            finish_pair(pair, has_second ? pair + kVectorBytes : pair, rows, pair, has_second);
        } else {
            finish_pair(position, position, rows, pair, has_second);
            position += kVectorBytes;
        }
    }
    return position;
}

// See scalar::expand.
template <Values kValues, Storage kStorage>
const std::uint8_t* expand(const std::uint8_t* position, const std::uint8_t* multipliers, int count,
                           std::uint8_t* out) {
    static_assert(!lies_expanded(kValues, kStorage));
    if constexpr (kStorage == Storage::blocks) return expand_blocks(position, count, out);
    for (int first = 0; first < count; first += kGroupVectors, out += kGroupVectors * kVectorBytes) {
        const int size = std::min(kGroupVectors, count - first);
        if constexpr (kValues == Values::i4) {
            const std::uint8_t* rows = multipliers + first / kScaleVectors * kPanelRows;
            position = expand_group_i4<kStorage>(position, rows, size, out);
        } else {
            const std::uint8_t* masks = position;
            position += std::size_t(size) * sizeof(Mask<kValues>);
            for (int v = 0; v < size; ++v, masks += sizeof(Mask<kValues>)) {
                const int num_values = expand_vector<kValues>(masks, position, out + v * kVectorBytes);
                position += std::size_t(num_values) * bytes_per_value(kValues);
            }
        }
    }
    return position;
}

}  // namespace gossamer::avx2
GOSSAMER_END
