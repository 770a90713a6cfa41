// What surrounds the products, by vectors: see ../vector.hpp.

#include <algorithm>
#include <cmath>

#include "kernels/kernels.hpp"
#include "kernels/vector.hpp"
#include "kernels/x86/exponential.hpp"
#include "kernels/x86/target.hpp"

namespace gossamer {

using namespace vector;

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
