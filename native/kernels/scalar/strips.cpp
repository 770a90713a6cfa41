// Products of training with a fixed mask: out += W in at the mask's positions, and W's gradient at them
// alone.
//
//   multiply   out[o, t]     += sum over the values of row o:  value x in[index, t]
//   project    gradient[v]   += sum over 64 tokens:            delta[o, t] x in[index of v, t]
//
// Tokens are contiguous: a tile of 96 inputs x 64 tokens (24 KB) stays in the L1 cache while the rows of a
// strip of W pass by.
//
// Numerics: float32. Sums over inputs run in the order of the indices on every level, sums over tokens in an
// order of the level's own. Other levels fuse multiply and add, scalar rounds in between: |difference| <= 2 n
// eps sum|a b| for n terms.
//
// The idea of training on the values alone, on CPUs: SparseProp (Nikdan et al., arXiv 2302.04852).

#include "kernels/kernels.hpp"

namespace gossamer {

constexpr int T = kTileTokens;

namespace scalar {

void multiply(const Strip& strip, const float* in, float* out) {
    std::size_t v = 0;
    for (int row = 0; row < strip.rows; ++row, out += T) {
        for (const std::size_t end = v + strip.counts[row]; v < end; ++v) {
            const float* x = in + std::size_t(strip.index[v]) * T;
            for (int t = 0; t < T; ++t) out[t] += strip.values[v] * x[t];
        }
    }
}

void project(const Strip& strip, const float* in, const float* delta, float* gradient) {
    std::size_t v = 0;
    for (int row = 0; row < strip.rows; ++row, delta += T) {
        for (const std::size_t end = v + strip.counts[row]; v < end; ++v) {
            const float* x = in + std::size_t(strip.index[v]) * T;
            float sum = 0;
            for (int t = 0; t < T; ++t) sum += delta[t] * x[t];
            gradient[v] += sum;
        }
    }
}

}  // namespace scalar

}  // namespace gossamer
