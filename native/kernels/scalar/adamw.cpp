// One step of AdamW (arXiv 1711.05101, decay decoupled from the gradient, as torch.optim.AdamW), in place.
//
//   m = m + (g - m) (1 - beta1)
//   v = v beta2 + (g g) (1 - beta2)
//   w = w (1 - rate decay) - (m rate / (1 - beta1^t)) / (sqrt(v) / sqrt(1 - beta2^t) + eps)
//
// There are four arrays of `count` floats, which meet element by element; of a sparse weight they have its
// values only.
//
// Every operation is float32, correctly rounded and in the order written, so that all levels, and any split
// over threads, give the same bits. The factors are rounded once from float64. g = m = v = w = 0 gives +-0.
//
// The bound is memory: 16 bytes are read and 12 written for each element.

#include <cmath>

#include "kernels/kernels.hpp"

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

}  // namespace gossamer
