// The one table of kernels: dispatch, tests and benchmarks all go through it.
//
// Kernels are single-threaded over the range they are given, allocate nothing and throw nothing.
#pragma once

#include <span>
#include <vector>

#include "isa.hpp"
#include "view.hpp"

namespace gossamer {

// y_TN[t * stride + n] = sum_k w_NK[n, k] x_TK[t, k] for the rows of panels [begin, end), padding rows
// included.
using Matmul = void (*)(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                        std::size_t stride);

// The exact integer sums under an i8 or i4 product: acc_TN[t, n] = sum_k w_NK[n, k] q_TK[t, k], with the signed
// q and int8 weights.
using Accumulate = void (*)(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                            std::size_t stride);

struct MatmulRow {
    Values values;
    Storage storage;
    Isa isa;
    Matmul matmul;
    Accumulate accumulate;  // i8 and i4 only
};

// One new token against the cached positions of one key/value head (attention.cpp).
struct AttentionTask {
    const float* q_AE;      // rotated queries of the heads that share the key/value head
    const float* k_blocks;  // [position / 16][E][16]
    const float* v_SE;      // [position][E padded to 16]
    int num_heads;
    int num_positions;
    int head_dim;
    float scale;
    float* scores;  // scratch [num_heads][num_positions padded to 16]
    float* out_AE;
};

// Everything that is not a matrix product. Rows of each family give bit-equal results on every level.
struct VectorRow {
    Isa isa;
    void (*rmsnorm)(const float* x_D, const float* weight_D, float eps, int count, float* y_D);
    // Writes q + 128 and the scale max|x| / 127.5.
    void (*quantize)(const float* x_K, int count, std::uint8_t* q_K, float* scale);
    // x = high + low, two bfloat16.
    void (*split)(const float* x_K, int count, std::uint16_t* high_K, std::uint16_t* low_K);
    void (*swiglu)(const float* gate, const float* up, int count, float* y);  // y may be gate
    void (*attention)(const AttentionTask& task);
    // Sums `count` bytes (a multiple of 64), touching each cache line once: the read-bandwidth probe.
    std::uint64_t (*read)(const std::uint8_t* data, std::size_t count, std::size_t prefetch_bytes);
};

std::vector<MatmulRow> matmul_table();
std::span<const VectorRow> vector_table();

// The row for `isa`, or the best below it. `emulated` takes rows of the amx level whose tiles are emulated.
const MatmulRow& find_matmul(Storage storage, Values values, Isa isa, bool emulated = false);
const VectorRow& find_vector(Isa isa);

}  // namespace gossamer
