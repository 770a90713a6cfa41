// Rotary position embedding of the heads of one token, in place, as Hugging Face does it.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)       a, b: element e of the first and of the second half
//
// Products and sums are rounded one by one: every level gives the same bits. Bound by the cache: 2 E floats a
// head, once per token and layer.

#include "kernels/kernels.hpp"
#include "kernels/target.hpp"

namespace gossamer {

namespace scalar {

void rope(float* x_HE, int num_heads, int head_dim, const float* cos_sin) {
    const int half = head_dim / 2;
    for (float* head = x_HE; head != x_HE + std::ptrdiff_t(num_heads) * head_dim; head += head_dim) {
        for (int e = 0; e < half; ++e) {
            const float a = head[e], b = head[half + e];
            head[e] = a * cos_sin[e] - b * cos_sin[half + e];
            head[half + e] = b * cos_sin[e] + a * cos_sin[half + e];
        }
    }
}

}  // namespace scalar

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
