// What surrounds the products: RMSNorm, quantization of activations, SwiGLU.
//
//   rmsnorm    y = weight * (x / sqrt(mean(x^2) + eps)); squares summed in float64, in 16 lanes, then in
//   order swiglu     y = gate / (1 + exp(-gate)) * up quantize   scale = max|x| / 127.5;  q = clamp(round(x /
//   scale), -128, 127), stored as q + 128
//              (compressed-tensors' dynamic symmetric per-token scheme; scale = 2^-23 when x is all zeros)
//   split      x = high + low, the nearest bfloat16 and that of the rest: for products on the matrix unit
//
// Only correctly rounded operations in a stated order: every level gives the same bits, so that INT8 results
// do not hang on which level ran.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/exponential.hpp"
#include "kernels/kernels.hpp"
#include "kernels/target.hpp"

namespace gossamer {
namespace {

constexpr int kLanes = 16;
constexpr float kEpsilon = 1.1920929e-7f;  // 2^-23

float inverse_rms(const double (&lanes)[kLanes], int count, float eps) {
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return 1.0f / std::sqrt(float(sum / count) + eps);
}

// The nearest bfloat16, halves to even.
std::uint16_t to_bf16(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    return std::uint16_t((bits + (bits >> 16 & 1) + 0x7FFF) >> 16);
}

float quantization_scale(float largest) {
    const float scale = largest / 127.5f;
    return scale == 0.0f ? kEpsilon : scale;
}

}  // namespace

namespace scalar {

float largest(const float* x, int count) {
    float found = 0;
    for (int i = 0; i < count; ++i) found = std::max(found, std::abs(x[i]));
    return found;
}

float rmsnorm(const float* x_D, const float* weight_D, float eps, int count, float* y_D) {
    double lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i % kLanes] += double(x_D[i]) * double(x_D[i]);
    const float inverse = inverse_rms(lanes, count, eps);
    for (int i = 0; i < count; ++i) y_D[i] = weight_D[i] * (x_D[i] * inverse);
    return largest(y_D, count);
}

float quantize(const float* x_K, int count, float largest_x, std::uint8_t* q_K) {
    const float scale = quantization_scale(largest_x);
    for (int i = 0; i < count; ++i)
        q_K[i] = std::uint8_t(std::clamp(int(std::nearbyint(x_K[i] / scale)), -128, 127) + 128);
    return scale;
}

void split(const float* x_K, int count, std::uint16_t* high_K, std::uint16_t* low_K) {
    for (int i = 0; i < count; ++i) {
        high_K[i] = to_bf16(x_K[i]);
        low_K[i] = to_bf16(x_K[i] - std::bit_cast<float>(std::uint32_t(high_K[i]) << 16));
    }
}

float swiglu(const float* gate, const float* up, int count, float* y) {
    for (int i = 0; i < count; ++i) y[i] = gate[i] / (1.0f + exponential_of(-gate[i])) * up[i];
    return largest(y, count);
}

}  // namespace scalar

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

// The bits of the nearest bfloat16, halves to even, in the low words.
inline __m512i nearest_bf16(__m512 x) {
    const __m512i bits = _mm512_castps_si512(x);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    return _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7FFF))), 16);
}

}  // namespace

float largest(const float* x, int count) {
    __m512 found = _mm512_setzero_ps();
    for (int i = 0; i < count; i += kLanes)
        found = _mm512_max_ps(found, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(count - i), x + i)));
    return _mm512_reduce_max_ps(found);
}

float rmsnorm(const float* x_D, const float* weight_D, float eps, int count, float* y_D) {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (int i = 0; i < count; i += kLanes) {
        const __m512 x = _mm512_maskz_loadu_ps(first_lanes(count - i), x_D + i);
        const __m512d x_low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
        const __m512d x_high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
        low = _mm512_add_pd(low, _mm512_mul_pd(x_low, x_low));
        high = _mm512_add_pd(high, _mm512_mul_pd(x_high, x_high));
    }
    double lanes[kLanes];
    _mm512_storeu_pd(lanes, low);
    _mm512_storeu_pd(lanes + 8, high);
    const __m512 inverse = _mm512_set1_ps(inverse_rms(lanes, count, eps));
    __m512 found = _mm512_setzero_ps();
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x_D + i), inverse);
        const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, weight_D + i), x);
        _mm512_mask_storeu_ps(y_D + i, mask, y);
        found = _mm512_max_ps(found, _mm512_abs_ps(y));
    }
    return _mm512_reduce_max_ps(found);
}

float quantize(const float* x_K, int count, float largest_x, std::uint8_t* q_K) {
    const float scale = quantization_scale(largest_x);
    const __m512 divisor = _mm512_set1_ps(scale);
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 x = _mm512_maskz_loadu_ps(mask, x_K + i);
        const __m128i steps = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_div_ps(x, divisor)));
        _mm_mask_storeu_epi8(q_K + i, mask, _mm_xor_si128(steps, _mm_set1_epi8(-128)));
    }
    return scale;
}

void split(const float* x_K, int count, std::uint16_t* high_K, std::uint16_t* low_K) {
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 x = _mm512_maskz_loadu_ps(mask, x_K + i);
        const __m512i high = nearest_bf16(x);
        const __m512i low = nearest_bf16(_mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16))));
        _mm256_mask_storeu_epi16(high_K + i, mask, _mm512_cvtepi32_epi16(high));
        _mm256_mask_storeu_epi16(low_K + i, mask, _mm512_cvtepi32_epi16(low));
    }
}

float swiglu(const float* gate, const float* up, int count, float* y) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 found = _mm512_setzero_ps();
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
        const __m512 negative = _mm512_xor_ps(g, _mm512_set1_ps(-0.0f));
        const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, exponential_of(negative)));
        const __m512 product = _mm512_mul_ps(silu, _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(y + i, mask, product);
        found = _mm512_max_ps(found, _mm512_abs_ps(product));
    }
    return _mm512_reduce_max_ps(found);
}

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
