// exp(x) by vectors: see ../exponential.hpp.
//
// 2^n comes from the low bits of the rounded sum: (bits + 127) << 23 leaves n + 127 alone.
#pragma once

#include "kernels/exponential.hpp"
#include "kernels/x86/target.hpp"

GOSSAMER_BEGIN_AVX2
namespace gossamer::avx2 {

inline __m256 exponential_of(__m256 x) {
    using namespace exponential;
    x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(kLow)), _mm256_set1_ps(kHigh));
    const __m256 shifted = _mm256_fmadd_ps(x, _mm256_set1_ps(kLog2e), _mm256_set1_ps(kRound));
    const __m256 n = _mm256_sub_ps(shifted, _mm256_set1_ps(kRound));
    const __m256 high = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2High), x);
    const __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(kLn2Low), high);
    __m256 p = _mm256_set1_ps(kPolynomial[0]);
    for (int i = 1; i < 6; ++i) p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(kPolynomial[i]));
    const __m256 y = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    const __m256i exponent = _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127));
    return _mm256_mul_ps(y, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

}  // namespace gossamer::avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace gossamer::avx512 {

inline __m512 exponential_of(__m512 x) {
    using namespace exponential;
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(kLow)), _mm512_set1_ps(kHigh));
    const __m512 shifted = _mm512_fmadd_ps(x, _mm512_set1_ps(kLog2e), _mm512_set1_ps(kRound));
    const __m512 n = _mm512_sub_ps(shifted, _mm512_set1_ps(kRound));
    const __m512 high = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2High), x);
    const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(kLn2Low), high);
    __m512 p = _mm512_set1_ps(kPolynomial[0]);
    for (int i = 1; i < 6; ++i) p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kPolynomial[i]));
    const __m512 y = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    const __m512i exponent = _mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127));
    return _mm512_mul_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
}

}  // namespace gossamer::avx512
GOSSAMER_END
