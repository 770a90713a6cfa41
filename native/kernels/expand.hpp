// Weights of a panel as whole vectors: the one place that knows how sparse streams and int4 pairs are stored.
//
// A sparse panel is groups of 16 masks and then the values under their bits; a pair of int4 vectors A, B
// shares its bytes, A's weights in the low nibbles. `scalar::expand_panel` is the specification. `avx512`
// puts a vector's values where its mask has ones with `vpexpandb/w/d`; on Zen 4 that takes 1.5 cycles, moving
// the mask to a mask register 1.0, a load across two cache lines 0.5 more. It waits for its destination, even
// to zero it: expanding into one register again and again costs 6 cycles, so it expands in place. `avx2` has
// no such instruction: 8 weights at a time, by a byte shuffle from a table of 256 mask bytes (2 KiB, in L1).
// Kernels for few tokens take vectors from `Reader` as they come; for many, a run of them is expanded once
// into the cache.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <type_traits>
#include <utility>

#include "base/view.hpp"
#include "kernels/target.hpp"

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

template <Values kValues>
using Mask = std::conditional_t<kValues == Values::f32, std::uint16_t,
                                std::conditional_t<kValues == Values::bf16, std::uint32_t, std::uint64_t>>;

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

namespace scalar {

// Expands the next `count` vectors of a panel, from `position` in its data and `multipliers` (i4: those of
// the first vector), to `out` [count][64]; returns the position after them. `count` is a multiple of 32, or
// all that are left.
template <Values kValues, Storage kStorage>
const std::uint8_t* expand(const std::uint8_t* position, const std::uint8_t* multipliers, int count,
                           std::uint8_t* out) {
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

GOSSAMER_BEGIN_AVX512
namespace gossamer::avx512 {

// The values packed at `values` where the mask has ones, zeros elsewhere.
template <Values kValues>
inline __m512i place(Mask<kValues> mask, __m512i values) {
    if constexpr (kValues == Values::f32) {
        __asm__("vpexpandd %0, %0%{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
    } else if constexpr (kValues == Values::bf16) {
        __asm__("vpexpandw %0, %0%{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
    } else {
        __asm__("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(values) : "Yk"(mask));
    }
    return values;
}

// A walk through one panel, vector by vector; int4 vectors come as 16 * q4, without their multipliers.
template <Values kValues, Storage kStorage>
struct Reader {
    const std::uint8_t* position;

    // Calls pair(a, b) for each two of the next `count` vectors, and last(a) if their number is odd. `count`
    // is a multiple of 16, or all that are left. `kUnrolled` suits short bodies.
    template <bool kUnrolled = true, class Pair, class Last>
    [[gnu::always_inline]] inline void read(int count, Pair pair, Last last) {
        if constexpr (kStorage == Storage::dense) {
            for (; count >= 2; count -= 2) read_pair(position, pair);
            if (count == 1) read_last(position, last);
            return;
        }
        for (; count >= kGroupVectors; count -= kGroupVectors) {
            const std::uint8_t* masks = position;
            position += kGroupVectors * sizeof(Mask<kValues>);
            if constexpr (kUnrolled) {
#pragma GCC unroll 8
                for (int v = 0; v < kGroupVectors; v += 2)
                    read_pair(masks + std::size_t(v) * sizeof(Mask<kValues>), pair);
            } else {
#pragma GCC unroll 1
                for (int v = 0; v < kGroupVectors; v += 2)
                    read_pair(masks + std::size_t(v) * sizeof(Mask<kValues>), pair);
            }
        }
        const std::uint8_t* masks = position;
        position += std::size_t(count) * sizeof(Mask<kValues>);
        for (; count >= 2; count -= 2, masks += 2 * sizeof(Mask<kValues>)) read_pair(masks, pair);
        if (count == 1) read_last(masks, last);
    }

  private:
    static Mask<kValues> mask_at(const std::uint8_t* masks) {
        auto mask = load_as<Mask<kValues>>(masks);
        __asm__("" : "+r"(mask));  // one load for both of its uses
        return mask;
    }

    [[gnu::always_inline]] inline __m512i next(const std::uint8_t* masks) {
        __m512i vector = _mm512_loadu_si512(position);
        if constexpr (kStorage == Storage::dense) {
            position += kVectorBytes;
        } else {
            const Mask<kValues> mask = mask_at(masks);
            vector = place<kValues>(mask, vector);
            position += _mm_popcnt_u64(mask) * bytes_per_value(kValues);
        }
        return vector;
    }

    template <class Pair>
    [[gnu::always_inline]] inline void read_pair(const std::uint8_t* masks, Pair& pair) {
        if constexpr (kValues != Values::i4) {
            const __m512i first = next(masks);
            pair(first, next(masks + sizeof(Mask<kValues>)));
        } else {
            const __m512i bytes = _mm512_loadu_si512(position), high = _mm512_set1_epi8(char(0xF0));
            __m512i first = _mm512_and_si512(_mm512_slli_epi16(bytes, 4), high);
            __m512i second = _mm512_and_si512(bytes, high);
            if constexpr (kStorage == Storage::dense) {
                position += kVectorBytes;
            } else {
                const std::uint64_t a = mask_at(masks), b = mask_at(masks + 8);
                first = place<kValues>(a, first);
                second = place<kValues>(b, second);
                position += std::max(_mm_popcnt_u64(a), _mm_popcnt_u64(b));
            }
            pair(first, second);
        }
    }

    template <class Last>
    [[gnu::always_inline]] inline void read_last(const std::uint8_t* masks, Last& last) {
        if constexpr (kValues != Values::i4) {
            last(next(masks));
        } else {
            const __m512i bytes = _mm512_slli_epi16(_mm512_loadu_si512(position), 4);
            __m512i vector = _mm512_and_si512(bytes, _mm512_set1_epi8(char(0xF0)));
            if (kStorage == Storage::sparse) vector = place<kValues>(mask_at(masks), vector);
            last(vector);
        }
    }
};

// 16 times the multipliers of 16 rows, in both words of a row's 4 bytes.
inline __m512i row_factors(const std::uint8_t* multipliers) {
    const __m128i rows = _mm_loadu_si128(reinterpret_cast<const __m128i*>(multipliers));
    return _mm512_mullo_epi32(_mm512_cvtepu8_epi32(rows), _mm512_set1_epi32(0x00100010));
}

// int8 weights q4 * multiplier of 16 * q4 and row_factors: (4096 q4 * 16 m) >> 16, in bytes.
inline __m512i multiply_rows(__m512i q, __m512i factors) {
    const __m512i even = _mm512_mulhi_epi16(_mm512_slli_epi16(q, 8), factors);
    const __m512i odd = _mm512_mulhi_epi16(_mm512_and_si512(q, _mm512_set1_epi16(-256)), factors);
    const __m512i low = _mm512_set1_epi16(255);
    return _mm512_or_si512(_mm512_and_si512(even, low), _mm512_slli_epi16(odd, 8));
}

// See scalar::expand.
template <Values kValues, Storage kStorage>
const std::uint8_t* expand(const std::uint8_t* position, const std::uint8_t* multipliers, int count,
                           std::uint8_t* out) {
    Reader<kValues, kStorage> reader{position};
    __m512i factors = _mm512_setzero_si512();
    const auto store = [&](__m512i vector) {
        if (kValues == Values::i4) vector = multiply_rows(vector, factors);
        _mm512_storeu_si512(out, vector);
        out += kVectorBytes;
    };
    const auto store_pair = [&](__m512i first, __m512i second) {
        store(first);
        store(second);
    };
    constexpr int kRun = kValues == Values::i4 ? kScaleVectors : kChunkVectors;
    for (int first = 0; first < count; first += kRun) {
        if (kValues == Values::i4) factors = row_factors(multipliers + first / kScaleVectors * kPanelRows);
        reader.read(std::min(kRun, count - first), store_pair, store);
    }
    return reader.position;
}

// The run of `count` vectors of a panel from `v` on, filled up with zeros to `filled`: in the file if it lies
// there so, else expanded into `buffer` from `position`, which moves past it.
template <Values kValues, Storage kStorage>
const std::uint8_t* expanded_run(const Linear& w, int panel, int v, int count, int filled,
                                 const std::uint8_t*& position, std::uint8_t* buffer) {
    if (lies_expanded(kValues, kStorage) && filled == count) {
        const std::uint8_t* run = position;
        position += std::size_t(count) * kVectorBytes;
        return run;
    }
    position = expand<kValues, kStorage>(position, w.panel_multipliers(panel, v), count, buffer);
    std::memset(buffer + count * kVectorBytes, 0, std::size_t(filled - count) * kVectorBytes);
    return buffer;
}

}  // namespace gossamer::avx512
GOSSAMER_END
