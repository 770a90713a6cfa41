// Products of int8 weights and int8 activations, dense and sparse.
//
//   y[t, n] = (sum_k w[n, k] (u[t, k] - 128)) * (x_scale[t] * w_scale[n])      u = q + 128, unsigned
//           = (sum_k w[n, k] u[t, k] - 128 w_sum[n]) * ...
//
// The sum is an exact int32 (K <= 65536 keeps |w u| sums below 2^31), so every level gives the same bits.
//
// Dense: 64 bytes of weights are one vector, 16 rows x 4 inputs; `vpdpbusd` adds 4 products to each of 16
// rows. Sparse: 16 masks of 64 bits, then the nonzero bytes; `vpexpandb` puts a vector's bytes where its mask
// has ones. On Zen 4 it takes 1.5 cycles, moving its mask to a mask register 1.0, a load across two cache
// lines 0.5 more; the whole loop 3.3 a vector (3.0 on Emerald Rapids). At 70% zeros a vector is 27 bytes: 30
// GB/s a core at 3.7 GHz. Two traps there: `vpexpandb` waits for its destination, even to zero it (expanding
// into one register again and again costs 6 cycles a vector: expand in place); and software prefetch, 0.5 to
// 4 KiB ahead, makes the loop 5 to 20% slower, so there is none.
// Above 8 tokens vectors are expanded once into the L1 cache, 128 at a time, and serve all blocks of 8
// tokens.

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/kernels.hpp"
#include "kernels/target.hpp"

namespace gossamer {
namespace {

constexpr int kSuperBlock = 256;  // tokens that share one expansion of the weights

std::uint64_t load_mask(const std::uint8_t* bytes) {
    std::uint64_t mask;
    std::memcpy(&mask, bytes, sizeof mask);
    return mask;
}

}  // namespace

namespace scalar {
namespace {

using Sums = std::int32_t[kTokenBlock][kPanelRows];

// acc[t, row] of one dense panel for a block of tokens whose inputs are q [V][token][4].
void dense_sums(const std::uint8_t* weights, int num_vectors, const std::uint8_t* q, int tokens, Sums& acc) {
    for (int v = 0; v < num_vectors; ++v, weights += kVectorBytes, q += 4 * tokens) {
        for (int t = 0; t < tokens; ++t) {
            for (int row = 0; row < kPanelRows; ++row) {
                for (int input = 0; input < 4; ++input) {
                    acc[t][row] += std::int8_t(weights[4 * row + input]) * int(q[4 * t + input]);
                }
            }
        }
    }
}

void sparse_sums(const std::uint8_t* stream, int num_vectors, const std::uint8_t* q, int tokens, Sums& acc) {
    for (int first = 0; first < num_vectors; first += kGroupVectors) {
        const int count = std::min(kGroupVectors, num_vectors - first);
        const std::uint8_t* values = stream + 8 * count;
        for (int v = 0; v < count; ++v, q += 4 * tokens) {
            for (std::uint64_t mask = load_mask(stream + 8 * v); mask != 0; mask &= mask - 1) {
                const int bit = std::countr_zero(mask);
                const int weight = std::int8_t(*values++);
                for (int t = 0; t < tokens; ++t) acc[t][bit / 4] += weight * int(q[4 * t + bit % 4]);
            }
        }
        stream = values;
    }
}

// Calls sink(panel, token, sums of 16 rows) for each panel and token.
template <class Sink>
void product(const Linear& w, int begin, int end, const Activations& x, Sink sink) {
    const auto sums = w.storage == Storage::sparse ? sparse_sums : dense_sums;
    for (int panel = begin; panel < end; ++panel) {
        for (int first = 0; first < x.num_tokens; first += kTokenBlock) {
            const int tokens = x.block_tokens(first);
            Sums acc = {};
            sums(w.panel(panel), w.num_vectors(), x.q_block(first), tokens, acc);
            for (int t = 0; t < tokens; ++t) sink(panel, first + t, acc[t]);
        }
    }
}

void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    product(w, begin, end, x, [&](int panel, int token, const std::int32_t* acc) {
        for (int row = 0; row < kPanelRows; ++row) {
            const int n = panel * kPanelRows + row;
            y_TN[token * stride + n] = float(acc[row] - 128 * w.sum[n]) * (x.scale[token] * w.scale[n]);
        }
    });
}

void accumulate(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                std::size_t stride) {
    product(w, begin, end, x, [&](int panel, int token, const std::int32_t* acc) {
        for (int row = 0; row < kPanelRows; ++row) {
            const int n = panel * kPanelRows + row;
            acc_TN[token * stride + n] = acc[row] - 128 * w.sum[n];
        }
    });
}

}  // namespace

void matmul_dense_i8(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                     std::size_t stride) {
    matmul(w, begin, end, x, y_TN, stride);
}
void matmul_sparse_i8(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                      std::size_t stride) {
    matmul(w, begin, end, x, y_TN, stride);
}
void accumulate_dense_i8(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                         std::size_t stride) {
    accumulate(w, begin, end, x, acc_TN, stride);
}
void accumulate_sparse_i8(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                          std::size_t stride) {
    accumulate(w, begin, end, x, acc_TN, stride);
}

}  // namespace scalar

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

constexpr int kChunkVectors = 128;  // 8 KiB expanded

inline __m512i broadcast4(const std::uint8_t* q) {
    std::int32_t four;
    std::memcpy(&four, q, sizeof four);
    return _mm512_set1_epi32(four);
}

// The int32 sums of 16 rows for T tokens. Two chains for few tokens hide the latency of vpdpbusd.
template <int T>
struct Accumulators {
    static constexpr int kChains = T <= 4 ? 2 : 1;
    __m512i chain[kChains][T];

    Accumulators() {
        for (auto& sums : chain) {
            for (__m512i& sum : sums) sum = _mm512_setzero_si512();
        }
    }
    inline void add(int which, __m512i weights, const std::uint8_t* q) {
        for (int t = 0; t < T; ++t) {
            chain[which][t] = _mm512_dpbusd_epi32(chain[which][t], broadcast4(q + 4 * t), weights);
        }
    }
    inline __m512i sum(int t) const {
        return kChains == 1 ? chain[0][t] : _mm512_add_epi32(chain[0][t], chain[kChains - 1][t]);
    }
};

template <int T>
inline void add_dense(const std::uint8_t* weights, int num_vectors, const std::uint8_t* q,
                      Accumulators<T>& acc) {
    constexpr int kLast = Accumulators<T>::kChains - 1;
    int v = 0;
    for (; v + 2 <= num_vectors; v += 2, weights += 2 * kVectorBytes, q += 8 * T) {
        acc.add(0, _mm512_loadu_si512(weights), q);
        acc.add(kLast, _mm512_loadu_si512(weights + kVectorBytes), q + 4 * T);
    }
    if (v < num_vectors) acc.add(0, _mm512_loadu_si512(weights), q);
}

// The next vector of a sparse stream, expanded in place; moves past its values.
inline __m512i expand(std::uint64_t mask, const std::uint8_t*& values) {
    __asm__("" : "+r"(mask));  // one load of the mask for both of its uses
    __m512i vector = _mm512_loadu_si512(values);
    __asm__("vpexpandb %0, %0%{%1%}%{z%}" : "+v"(vector) : "Yk"(mask));
    values += _mm_popcnt_u64(mask);
    return vector;
}

template <int T>
inline void add_sparse(const std::uint8_t* stream, int num_vectors, const std::uint8_t* q,
                       Accumulators<T>& acc) {
    constexpr int kLast = Accumulators<T>::kChains - 1;
    int left = num_vectors;
    for (; left >= kGroupVectors; left -= kGroupVectors) {
        const std::uint8_t* masks = stream;
        const std::uint8_t* values = stream + 8 * kGroupVectors;
#pragma GCC unroll 8
        for (int v = 0; v < kGroupVectors; v += 2, q += 8 * T) {
            acc.add(0, expand(load_mask(masks + 8 * v), values), q);
            acc.add(kLast, expand(load_mask(masks + 8 * v + 8), values), q + 4 * T);
        }
        stream = values;
    }
    const std::uint8_t* values = stream + 8 * left;
    for (int v = 0; v < left; ++v, q += 4 * T) acc.add(0, expand(load_mask(stream + 8 * v), values), q);
}

// One panel, up to 8 tokens, straight from the file.
template <bool kSparse, int T, class Sink>
void block(const Linear& w, int panel, const Activations& x, Sink sink) {
    Accumulators<T> acc;
    if constexpr (kSparse) {
        add_sparse<T>(w.panel(panel), w.num_vectors(), x.q, acc);
    } else {
        add_dense<T>(w.panel(panel), w.num_vectors(), x.q, acc);
    }
    for (int t = 0; t < T; ++t) sink(panel, t, acc.sum(t));
}

// A walk through the vectors of a panel, a chunk at a time, expanded.
template <bool kSparse>
struct Chunks {
    const std::uint8_t* position;
    alignas(64) std::uint8_t expanded[kSparse ? kChunkVectors * kVectorBytes : 1];

    const std::uint8_t* next(int count) {
        if constexpr (!kSparse) {
            const std::uint8_t* weights = position;
            position += std::size_t(count) * kVectorBytes;
            return weights;
        } else {
            std::uint8_t* out = expanded;
            for (int first = 0; first < count; first += kGroupVectors) {
                const int group = std::min(kGroupVectors, count - first);
                const std::uint8_t* values = position + 8 * group;
                for (int v = 0; v < group; ++v, out += kVectorBytes) {
                    _mm512_store_si512(out, expand(load_mask(position + 8 * v), values));
                }
                position = values;
            }
            return expanded;
        }
    }
};

template <int T>
void add_chunk(const std::uint8_t* weights, int num_vectors, const std::uint8_t* q, __m512i* sums) {
    __m512i acc[T];
    for (int t = 0; t < T; ++t) acc[t] = sums[t];
    for (int v = 0; v < num_vectors; ++v, weights += kVectorBytes, q += 4 * T) {
        const __m512i vector = _mm512_loadu_si512(weights);
        for (int t = 0; t < T; ++t) acc[t] = _mm512_dpbusd_epi32(acc[t], broadcast4(q + 4 * t), vector);
    }
    for (int t = 0; t < T; ++t) sums[t] = acc[t];
}

using AddChunk = void (*)(const std::uint8_t*, int, const std::uint8_t*, __m512i*);
constexpr AddChunk kAddChunk[kTokenBlock] = {add_chunk<1>, add_chunk<2>, add_chunk<3>, add_chunk<4>,
                                             add_chunk<5>, add_chunk<6>, add_chunk<7>, add_chunk<8>};

// One panel, any number of tokens from `origin` on, at most kSuperBlock.
template <bool kSparse, class Sink>
void super_block(const Linear& w, int panel, const Activations& x, int origin, Sink sink) {
    const int tokens = std::min(kSuperBlock, x.num_tokens - origin);
    alignas(64) __m512i sums[kSuperBlock];
    for (int t = 0; t < tokens; ++t) sums[t] = _mm512_setzero_si512();
    Chunks<kSparse> chunks;
    chunks.position = w.panel(panel);
    for (int v = 0; v < w.num_vectors(); v += kChunkVectors) {
        const int count = std::min(kChunkVectors, w.num_vectors() - v);
        const std::uint8_t* weights = chunks.next(count);
        for (int t = 0; t < tokens; t += kTokenBlock) {
            const int width = x.block_tokens(origin + t);
            kAddChunk[width - 1](weights, count, x.q_block(origin + t) + std::size_t(4) * v * width,
                                 sums + t);
        }
    }
    for (int t = 0; t < tokens; ++t) sink(panel, origin + t, sums[t]);
}

template <bool kSparse, int T, class Sink>
void panels(const Linear& w, int begin, int end, const Activations& x, Sink sink) {
    for (int panel = begin; panel < end; ++panel) block<kSparse, T>(w, panel, x, sink);
}

template <bool kSparse, class Sink>
void product(const Linear& w, int begin, int end, const Activations& x, Sink sink) {
    switch (x.num_tokens) {
        case 1:
            return panels<kSparse, 1>(w, begin, end, x, sink);
        case 2:
            return panels<kSparse, 2>(w, begin, end, x, sink);
        case 3:
            return panels<kSparse, 3>(w, begin, end, x, sink);
        case 4:
            return panels<kSparse, 4>(w, begin, end, x, sink);
        case 5:
            return panels<kSparse, 5>(w, begin, end, x, sink);
        case 6:
            return panels<kSparse, 6>(w, begin, end, x, sink);
        case 7:
            return panels<kSparse, 7>(w, begin, end, x, sink);
        case 8:
            return panels<kSparse, 8>(w, begin, end, x, sink);
        default:
            break;
    }
    for (int panel = begin; panel < end; ++panel) {
        for (int origin = 0; origin < x.num_tokens; origin += kSuperBlock)
            super_block<kSparse>(w, panel, x, origin, sink);
    }
}

inline __m512i signed_sums(const Linear& w, int panel, __m512i sums) {
    const __m512i row_sums = _mm512_loadu_si512(w.sum + panel * kPanelRows);
    return _mm512_sub_epi32(sums, _mm512_slli_epi32(row_sums, 7));
}

template <bool kSparse>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    product<kSparse>(w, begin, end, x, [&](int panel, int token, __m512i sums) {
        const __m512 row_scales = _mm512_loadu_ps(w.scale + panel * kPanelRows);
        const __m512 scales = _mm512_mul_ps(_mm512_set1_ps(x.scale[token]), row_scales);
        const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(signed_sums(w, panel, sums)), scales);
        _mm512_storeu_ps(y_TN + token * stride + panel * kPanelRows, y);
    });
}

template <bool kSparse>
void accumulate(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                std::size_t stride) {
    product<kSparse>(w, begin, end, x, [&](int panel, int token, __m512i sums) {
        _mm512_storeu_si512(acc_TN + token * stride + panel * kPanelRows, signed_sums(w, panel, sums));
    });
}

}  // namespace

void matmul_dense_i8(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                     std::size_t stride) {
    matmul<false>(w, begin, end, x, y_TN, stride);
}
void matmul_sparse_i8(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                      std::size_t stride) {
    matmul<true>(w, begin, end, x, y_TN, stride);
}
void accumulate_dense_i8(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                         std::size_t stride) {
    accumulate<false>(w, begin, end, x, acc_TN, stride);
}
void accumulate_sparse_i8(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                          std::size_t stride) {
    accumulate<true>(w, begin, end, x, acc_TN, stride);
}

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
