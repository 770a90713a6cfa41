// Products of float32 or bfloat16 weights, dense and sparse, and float32 activations: the specification.
//
//   y[t, n] = sum_k w[n, k] x[t, k]
//
// The sum is made of 2 I chains of fused multiply-adds, where a vector has I inputs of 16 rows. Input k
// belongs to chain c[k mod 2 I], and each chain runs in the order of k:
//
//   f32   (I = 1)   y = c0 + c1
//   bf16  (I = 2)   y = (c0 + c1) + (c2 + c3)
//
// The order is the same on every level but avx512-bf16 and amx, for any number of tokens and threads, and for
// dense and sparse weights, since a product with 0 changes no sum.
//
// For one token the bound is memory: a dense vector has 64 bytes; at 70% zeros a sparse one has 21 (f32) or
// 23 (bf16).

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/expand.hpp"
#include "kernels/kernels.hpp"

namespace gossamer {
namespace scalar {
namespace {

template <Values kValues, Storage kStorage>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    constexpr int kInputs = inputs_per_vector(kValues);
    const auto widen = [](const std::uint8_t* weight) {
        if (kValues == Values::f32) return load_as<float>(weight);
        return std::bit_cast<float>(std::uint32_t(load_as<std::uint16_t>(weight)) << 16);
    };
    for (int panel = begin; panel < end; ++panel) {
        for (int t = 0; t < x.num_tokens; ++t) {
            float chains[2 * kInputs][kPanelRows] = {};
            const std::uint8_t* position = w.panel(panel);
            for (int first = 0; first < w.num_vectors(); first += kGroupVectors) {
                const int count = std::min(kGroupVectors, w.num_vectors() - first);
                std::uint8_t expanded[kGroupVectors * kVectorBytes];
                position = expand<kValues, kStorage>(position, nullptr, count, expanded);
                for (int i = 0; i < count * kPanelRows * kInputs; ++i) {
                    const int row = i / kInputs % kPanelRows;
                    const int k = (first + i / (kPanelRows * kInputs)) * kInputs + i % kInputs;
                    float& sum = chains[k % (2 * kInputs)][row];
                    sum =
                        std::fma(widen(expanded + i * bytes_per_value(kValues)), x.x[t * x.stride + k], sum);
                }
            }
            float* y = y_TN + t * stride + panel * kPanelRows;
            for (int row = 0; row < kPanelRows; ++row) {
                y[row] = chains[0][row] + chains[1][row];
                if (kInputs == 2) y[row] += chains[2][row] + chains[3][row];
            }
        }
    }
}

}  // namespace

GOSSAMER_MATMUL(f32, dense)
GOSSAMER_MATMUL(f32, sparse)
GOSSAMER_MATMUL(bf16, dense)
GOSSAMER_MATMUL(bf16, sparse)

}  // namespace scalar
}  // namespace gossamer
