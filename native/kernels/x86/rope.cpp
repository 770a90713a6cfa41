// Rotary position embedding by vectors: see ../scalar/rope.cpp.

#include "kernels/kernels.hpp"
#include "kernels/x86/target.hpp"

namespace gossamer {

GOSSAMER_BEGIN_AVX2
namespace avx2 {

void rope(float* x_HE, int num_heads, int head_dim, const float* cos_sin) {
    constexpr int kWidth = 8;
    const int half = head_dim / 2;
    int e = 0;
    for (; e + kWidth <= half; e += kWidth) {
        const __m256 cosine = _mm256_loadu_ps(cos_sin + e), sine = _mm256_loadu_ps(cos_sin + half + e);
        for (int h = 0; h < num_heads; ++h) {
            float* first = x_HE + std::ptrdiff_t(h) * head_dim + e;
            const __m256 a = _mm256_loadu_ps(first), b = _mm256_loadu_ps(first + half);
            _mm256_storeu_ps(first, _mm256_sub_ps(_mm256_mul_ps(a, cosine), _mm256_mul_ps(b, sine)));
            _mm256_storeu_ps(first + half, _mm256_add_ps(_mm256_mul_ps(b, cosine), _mm256_mul_ps(a, sine)));
        }
    }
    for (; e < half; ++e) {
        for (int h = 0; h < num_heads; ++h) {
            float* first = x_HE + std::ptrdiff_t(h) * head_dim + e;
            const float a = first[0], b = first[half];
            first[0] = a * cos_sin[e] - b * cos_sin[half + e];
            first[half] = b * cos_sin[e] + a * cos_sin[half + e];
        }
    }
}

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {

void rope(float* x_HE, int num_heads, int head_dim, const float* cos_sin) {
    const int half = head_dim / 2;
    for (int e = 0; e < half; e += 16) {
        const __mmask16 mask = half - e >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << (half - e)) - 1);
        const __m512 cosine = _mm512_maskz_loadu_ps(mask, cos_sin + e);
        const __m512 sine = _mm512_maskz_loadu_ps(mask, cos_sin + half + e);
        for (int h = 0; h < num_heads; ++h) {
            float* first = x_HE + std::ptrdiff_t(h) * head_dim + e;
            const __m512 a = _mm512_maskz_loadu_ps(mask, first);
            const __m512 b = _mm512_maskz_loadu_ps(mask, first + half);
            const __m512 low = _mm512_sub_ps(_mm512_mul_ps(a, cosine), _mm512_mul_ps(b, sine));
            const __m512 high = _mm512_add_ps(_mm512_mul_ps(b, cosine), _mm512_mul_ps(a, sine));
            _mm512_mask_storeu_ps(first, mask, low);
            _mm512_mask_storeu_ps(first + half, mask, high);
        }
    }
}

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
