// Products of float32 or bfloat16 weights (dense) and float32 activations.
//
//   y[t, n] = sum_k w[n, k] x[t, k]       f32: one chain over k;   bf16: two, of the even and of the odd
//   inputs
//
// f32: a vector is 16 rows x 1 input, one multiply-add a token. bf16: 16 rows x 2 inputs, widened by a shift
// and a mask (`vdpbf16ps` takes two cycles and rounds x). Both are bound by memory for one token: 64 bytes a
// vector. The chains do not depend on the number of tokens or threads, so neither does a result. `avx512`
// fuses multiply and add, `scalar` does not: they agree to about sqrt(K) * 2^-24 of sum |w x|.

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/kernels.hpp"
#include "kernels/target.hpp"

namespace gossamer {

namespace scalar {

void matmul_dense_f32(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                      std::size_t stride) {
    for (int panel = begin; panel < end; ++panel) {
        for (int first = 0; first < x.num_tokens; first += kTokenBlock) {
            const int tokens = x.block_tokens(first);
            const float* inputs = x.x_block(first);
            const float* weights = reinterpret_cast<const float*>(w.panel(panel));
            float acc[kTokenBlock][kPanelRows] = {};
            for (int k = 0; k < w.columns; ++k, weights += kPanelRows, inputs += tokens) {
                for (int t = 0; t < tokens; ++t) {
                    for (int row = 0; row < kPanelRows; ++row) acc[t][row] += weights[row] * inputs[t];
                }
            }
            for (int t = 0; t < tokens; ++t) {
                std::copy(acc[t], acc[t] + kPanelRows, y_TN + (first + t) * stride + panel * kPanelRows);
            }
        }
    }
}

void matmul_dense_bf16(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                       std::size_t stride) {
    const auto widen = [](std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t(bits) << 16); };
    for (int panel = begin; panel < end; ++panel) {
        for (int first = 0; first < x.num_tokens; first += kTokenBlock) {
            const int tokens = x.block_tokens(first);
            const float* inputs = x.x_block(first);
            const std::uint16_t* weights = reinterpret_cast<const std::uint16_t*>(w.panel(panel));
            float even[kTokenBlock][kPanelRows] = {}, odd[kTokenBlock][kPanelRows] = {};
            for (int v = 0; v < w.num_vectors(); ++v, weights += 2 * kPanelRows, inputs += 2 * tokens) {
                for (int t = 0; t < tokens; ++t) {
                    for (int row = 0; row < kPanelRows; ++row) {
                        even[t][row] += widen(weights[2 * row]) * inputs[t];
                        odd[t][row] += widen(weights[2 * row + 1]) * inputs[tokens + t];
                    }
                }
            }
            for (int t = 0; t < tokens; ++t) {
                float* y = y_TN + (first + t) * stride + panel * kPanelRows;
                for (int row = 0; row < kPanelRows; ++row) y[row] = even[t][row] + odd[t][row];
            }
        }
    }
}

}  // namespace scalar

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

template <int T>
void block_f32(const std::uint8_t* weights, int num_vectors, const float* x, float* y, std::size_t stride) {
    __m512 acc[T];
    for (__m512& sum : acc) sum = _mm512_setzero_ps();
#pragma GCC unroll 4
    for (int v = 0; v < num_vectors; ++v, weights += kVectorBytes, x += T) {
        const __m512 vector = _mm512_loadu_ps(weights);
        for (int t = 0; t < T; ++t) acc[t] = _mm512_fmadd_ps(vector, _mm512_set1_ps(x[t]), acc[t]);
    }
    for (int t = 0; t < T; ++t) _mm512_storeu_ps(y + t * stride, acc[t]);
}

template <int T>
void block_bf16(const std::uint8_t* weights, int num_vectors, const float* x, float* y, std::size_t stride) {
    __m512 even[T], odd[T];
    for (__m512& sum : even) sum = _mm512_setzero_ps();
    for (__m512& sum : odd) sum = _mm512_setzero_ps();
    const __m512i high = _mm512_set1_epi32(std::int32_t(0xFFFF0000));
#pragma GCC unroll 2
    for (int v = 0; v < num_vectors; ++v, weights += kVectorBytes, x += 2 * T) {
        const __m512i vector = _mm512_loadu_si512(weights);
        const __m512 first = _mm512_castsi512_ps(_mm512_slli_epi32(vector, 16));
        const __m512 second = _mm512_castsi512_ps(_mm512_and_si512(vector, high));
        for (int t = 0; t < T; ++t) {
            even[t] = _mm512_fmadd_ps(first, _mm512_set1_ps(x[t]), even[t]);
            odd[t] = _mm512_fmadd_ps(second, _mm512_set1_ps(x[T + t]), odd[t]);
        }
    }
    for (int t = 0; t < T; ++t) _mm512_storeu_ps(y + t * stride, _mm512_add_ps(even[t], odd[t]));
}

using Block = void (*)(const std::uint8_t*, int, const float*, float*, std::size_t);

constexpr Block kBlockF32[kTokenBlock] = {block_f32<1>, block_f32<2>, block_f32<3>, block_f32<4>,
                                          block_f32<5>, block_f32<6>, block_f32<7>, block_f32<8>};
constexpr Block kBlockBf16[kTokenBlock] = {block_bf16<1>, block_bf16<2>, block_bf16<3>, block_bf16<4>,
                                           block_bf16<5>, block_bf16<6>, block_bf16<7>, block_bf16<8>};

// A panel stays in the L2 cache while all blocks of tokens pass over it.
void product(const Block (&blocks)[kTokenBlock], const Linear& w, int begin, int end, const Activations& x,
             float* y_TN, std::size_t stride) {
    for (int panel = begin; panel < end; ++panel) {
        for (int first = 0; first < x.num_tokens; first += kTokenBlock) {
            const Block multiply = blocks[x.block_tokens(first) - 1];
            multiply(w.panel(panel), w.num_vectors(), x.x_block(first),
                     y_TN + first * stride + panel * kPanelRows, stride);
        }
    }
}

}  // namespace

void matmul_dense_f32(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                      std::size_t stride) {
    product(kBlockF32, w, begin, end, x, y_TN, stride);
}

void matmul_dense_bf16(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                       std::size_t stride) {
    product(kBlockBf16, w, begin, end, x, y_TN, stride);
}

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
