// exp(x) in float32, the same bits on every level: n = round(x / ln 2), r = x - n ln 2 in two steps, the
// Cephes polynomial of degree 5, times 2^n, fused where a product meets a sum; about 1 unit in the last
// place. Arguments are clamped to [-87, 88].
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>

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
