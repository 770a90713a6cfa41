// exp(x) in float32, the same bits on every level: n = round(x / ln 2), r = x - n ln 2 in two steps, the
// Cephes polynomial of degree 5, times 2^n, fused where a product meets a sum; about 1 unit in the last
// place. Arguments are clamped to [-87, 88].
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

#include "kernels/target.hpp"

namespace gossamer::exponential {

constexpr float kLow = -87.0f, kHigh = 88.0f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even
constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
constexpr float kPolynomial[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};

}  // namespace gossamer::exponential

namespace gossamer::scalar {

inline float exponential_of(float x) {
    using namespace exponential;
    x = std::min(std::max(x, kLow), kHigh);
    const float shifted = std::fma(x, kLog2e, kRound), n = shifted - kRound;
    const float r = std::fma(-n, kLn2Low, std::fma(-n, kLn2High, x));
    float p = kPolynomial[0];
    for (int i = 1; i < 6; ++i) p = std::fma(p, r, kPolynomial[i]);
    const float y = std::fma(p, r * r, r) + 1.0f;
    return y * std::bit_cast<float>((std::int32_t(n) + 127) << 23);
}

}  // namespace gossamer::scalar

// Wider levels take 2^n from the low bits of the rounded sum: (bits + 127) << 23 leaves n + 127 alone.

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
