// Weights of a panel as whole vectors, by AVX-512: see ../expand.hpp.
//
// `vpexpandb`, `vpexpandw` and `vpexpandd` put a vector's values where its mask has ones. On Zen 4 that
// takes 1.5 cycles, moving the mask to a mask register 1.0, and a load across two cache lines 0.5 more. The
// instruction waits for its destination even when it zeroes it: expanding into one register again and again
// costs 6 cycles, so vectors are expanded in place. Kernels for few tokens take vectors from `Reader` as they
// come; for many tokens, a run of vectors is expanded once into the cache.
#pragma once

#include <algorithm>
#include <cstring>

#include "kernels/expand.hpp"
#include "kernels/x86/target.hpp"

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
    if constexpr (kStorage == Storage::blocks) return expand_blocks(position, count, out);
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
