// Rotary position embedding of the heads of one token, in place, as Hugging Face does it.
//
//   (a, b) -> (a cos - b sin, b cos + a sin)       a, b: element e of the first and of the second half
//
// Products and sums are rounded one by one, so that every level gives the same bits. The bound is the cache:
// 2 E floats are read for each head, token and layer.

#include "kernels/kernels.hpp"

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

}  // namespace gossamer
