// One step of AdamW (arXiv 1711.05101, decay decoupled from the gradient, as torch.optim.AdamW), in place.
//
//   m = m + (g - m) (1 - beta1)
//   v = v beta2 + (g g) (1 - beta2)
//   w = w (1 - rate decay) - (m rate / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// Layout: four arrays of `count` floats, elementwise; of a sparse weight only its values.
// Numerics: float32, every operation correctly rounded and in the order written: all levels, and any split
// over threads, give the same bits. The factors are rounded once from float64. g = m = v = w = 0 gives +-0.
// Bound: memory, 16 bytes read and 12 written an element; the two divisions and the root of 16 elements take
// some 50 cycles on avx512, below what a core waits for 448 bytes.

#include <cmath>

#include "kernels/kernels.hpp"
#include "kernels/target.hpp"

namespace gossamer {
namespace scalar {

void adamw(const AdamwStep& step, const float* g, std::size_t count, float* m, float* v, float* w) {
    for (std::size_t i = 0; i < count; ++i) {
        m[i] = m[i] + (g[i] - m[i]) * step.take1;
        v[i] = v[i] * step.keep2 + (g[i] * g[i]) * step.take2;
        w[i] = w[i] * step.shrink - (m[i] * step.rate) / (std::sqrt(v[i]) / step.correction2 + step.eps);
    }
}

}  // namespace scalar

GOSSAMER_BEGIN_AVX2
namespace avx2 {

void adamw(const AdamwStep& step, const float* g, std::size_t count, float* m, float* v, float* w) {
    constexpr std::size_t kLanes = 8;
    const __m256 take1 = _mm256_set1_ps(step.take1), keep2 = _mm256_set1_ps(step.keep2);
    const __m256 take2 = _mm256_set1_ps(step.take2), shrink = _mm256_set1_ps(step.shrink);
    const __m256 rate = _mm256_set1_ps(step.rate), correction2 = _mm256_set1_ps(step.correction2);
    const __m256 eps = _mm256_set1_ps(step.eps);
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const __m256 gradient = _mm256_loadu_ps(g + i), old = _mm256_loadu_ps(m + i);
        const __m256 first = _mm256_add_ps(old, _mm256_mul_ps(_mm256_sub_ps(gradient, old), take1));
        const __m256 second = _mm256_add_ps(_mm256_mul_ps(_mm256_loadu_ps(v + i), keep2),
                                            _mm256_mul_ps(_mm256_mul_ps(gradient, gradient), take2));
        const __m256 root = _mm256_div_ps(_mm256_sqrt_ps(second), correction2);
        const __m256 change = _mm256_div_ps(_mm256_mul_ps(first, rate), _mm256_add_ps(root, eps));
        _mm256_storeu_ps(m + i, first);
        _mm256_storeu_ps(v + i, second);
        _mm256_storeu_ps(w + i, _mm256_sub_ps(_mm256_mul_ps(_mm256_loadu_ps(w + i), shrink), change));
    }
    scalar::adamw(step, g + i, count - i, m + i, v + i, w + i);
}

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {

void adamw(const AdamwStep& step, const float* g, std::size_t count, float* m, float* v, float* w) {
    constexpr std::size_t kLanes = 16;
    const __m512 take1 = _mm512_set1_ps(step.take1), keep2 = _mm512_set1_ps(step.keep2);
    const __m512 take2 = _mm512_set1_ps(step.take2), shrink = _mm512_set1_ps(step.shrink);
    const __m512 rate = _mm512_set1_ps(step.rate), correction2 = _mm512_set1_ps(step.correction2);
    const __m512 eps = _mm512_set1_ps(step.eps);
    std::size_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const __m512 gradient = _mm512_loadu_ps(g + i), old = _mm512_loadu_ps(m + i);
        const __m512 first = _mm512_add_ps(old, _mm512_mul_ps(_mm512_sub_ps(gradient, old), take1));
        const __m512 second = _mm512_add_ps(_mm512_mul_ps(_mm512_loadu_ps(v + i), keep2),
                                            _mm512_mul_ps(_mm512_mul_ps(gradient, gradient), take2));
        const __m512 root = _mm512_div_ps(_mm512_sqrt_ps(second), correction2);
        const __m512 change = _mm512_div_ps(_mm512_mul_ps(first, rate), _mm512_add_ps(root, eps));
        _mm512_storeu_ps(m + i, first);
        _mm512_storeu_ps(v + i, second);
        _mm512_storeu_ps(w + i, _mm512_sub_ps(_mm512_mul_ps(_mm512_loadu_ps(w + i), shrink), change));
    }
    scalar::adamw(step, g + i, count - i, m + i, v + i, w + i);
}

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
