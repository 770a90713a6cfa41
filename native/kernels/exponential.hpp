// exp(x) in float32, the same bits on every level: only products and sums (the build forbids contraction), in
// the order below. The Cephes approximation: n = round(x / ln 2), r = x - n ln 2 in two steps, polynomial of
// degree 5, times 2^n; about 1 unit in the last place. Arguments are clamped to [-87, 88].
#pragma once

#include <algorithm>
#include <bit>
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
    const float n = (x * kLog2e + kRound) - kRound;
    const float r = (x - n * kLn2High) - n * kLn2Low;
    float p = kPolynomial[0];
    for (int i = 1; i < 6; ++i) p = p * r + kPolynomial[i];
    const float y = (p * (r * r) + r) + 1.0f;
    return y * std::bit_cast<float>((std::int32_t(n) + 127) << 23);
}

}  // namespace gossamer::scalar

GOSSAMER_BEGIN_AVX512
namespace gossamer::avx512 {

inline __m512 exponential_of(__m512 x) {
    using namespace exponential;
    x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(kLow)), _mm512_set1_ps(kHigh));
    const __m512 round = _mm512_set1_ps(kRound);
    const __m512 n = _mm512_sub_ps(_mm512_add_ps(_mm512_mul_ps(x, _mm512_set1_ps(kLog2e)), round), round);
    const __m512 high = _mm512_sub_ps(x, _mm512_mul_ps(n, _mm512_set1_ps(kLn2High)));
    const __m512 r = _mm512_sub_ps(high, _mm512_mul_ps(n, _mm512_set1_ps(kLn2Low)));
    __m512 p = _mm512_set1_ps(kPolynomial[0]);
    for (int i = 1; i < 6; ++i) p = _mm512_add_ps(_mm512_mul_ps(p, r), _mm512_set1_ps(kPolynomial[i]));
    const __m512 tail = _mm512_add_ps(_mm512_mul_ps(p, _mm512_mul_ps(r, r)), r);
    const __m512 y = _mm512_add_ps(tail, _mm512_set1_ps(1.0f));
    const __m512i exponent = _mm512_add_epi32(_mm512_cvttps_epi32(n), _mm512_set1_epi32(127));
    return _mm512_mul_ps(y, _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23)));
}

}  // namespace gossamer::avx512
GOSSAMER_END
