// bfloat16 by vectors: see ../bfloat16.hpp.
#pragma once

#include <cstdint>

#include "kernels/x86/target.hpp"

GOSSAMER_BEGIN_AVX2
namespace gossamer::avx2 {

// The bits of the nearest bfloat16, halves to even, in the low words.
inline __m256i nearest_bf16(__m256 x) {
    const __m256i bits = _mm256_castps_si256(x);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    return _mm256_srli_epi32(_mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF))), 16);
}

// Stores the low words of 8 numbers that have no others.
inline void store_words(std::uint16_t* to, __m256i x) {
    const __m256i twice = _mm256_permute4x64_epi64(_mm256_packus_epi32(x, x), _MM_SHUFFLE(3, 1, 2, 0));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_castsi256_si128(twice));
}

// The floats of 8 bfloat16.
inline __m256 widened(const std::uint16_t* from) {
    const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

}  // namespace gossamer::avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace gossamer::avx512 {

// The bits of the nearest bfloat16, halves to even, in the low words.
inline __m512i nearest_bf16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
}

// The floats of up to 16 bfloat16.
inline __m512 widened(const std::uint16_t* from, __mmask16 lanes) {
    const __m512i words = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
}

}  // namespace gossamer::avx512
GOSSAMER_END
