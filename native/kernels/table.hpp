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

// The exact integer sums under an i8 or i4 product: acc_TN[t, n] = sum_k w_NK[n, k] q_TK[t, k], with the
// signed q and int8 weights.
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
    // Both return max|y|, so that quantizing y reads it only once more.
    float (*rmsnorm)(const float* x_D, const float* weight_D, float eps, int count, float* y_D);
    float (*swiglu)(const float* gate, const float* up, int count, float* y);  // y may be gate
    float (*largest)(const float* x, int count);                               // max|x|
    // Writes q + 128 and returns the scale, max|x| / 127.5.
    float (*quantize)(const float* x_K, int count, float largest, std::uint8_t* q_K);
    // x = high + low, two bfloat16.
    void (*split)(const float* x_K, int count, std::uint16_t* high_K, std::uint16_t* low_K);
    void (*attention)(const AttentionTask& task);
};

// exp((x - highest) / temperature).
struct Softmax {
    float highest, inverse_temperature;
};

constexpr std::uint64_t kMassUnit = std::uint64_t(1) << 40;

// What choosing a token reads of a row of logits (sampling.cpp); every level gives the same.
struct SamplingRow {
    Isa isa;
    float (*highest)(const float* x, int count);  // NaN when one is
    // The sum of round(kMassUnit softmax(x)) over the x that are at least `low`; none is above `highest`.
    std::uint64_t (*mass)(const float* x, int count, const Softmax& softmax, float low);
    // Copies those with low <= x < high, in order, to another place with room for all; returns how many.
    int (*keep)(const float* x, int count, float low, float high, float* kept);
};

// What the machine can do at best (probes.cpp).
struct ProbeRow {
    Isa isa;
    // Sums `count` bytes (a multiple of 256), touching each cache line once.
    std::uint64_t (*read)(const std::uint8_t* data, std::size_t count, std::size_t prefetch_bytes);
    // Multiplies int8 in registers; returns how many multiply-adds that were.
    std::uint64_t (*multiply_int8)(std::uint64_t rounds);
};

std::vector<MatmulRow> matmul_table();
std::span<const VectorRow> vector_table();
std::span<const SamplingRow> sampling_table();
std::span<const ProbeRow> probe_table();

// The row for `isa`, or the best below it. `emulated` takes rows of the amx level whose tiles are emulated.
const MatmulRow& find_matmul(Storage storage, Values values, Isa isa, bool emulated = false);
const VectorRow& find_vector(Isa isa);
const SamplingRow& find_sampling(Isa isa);
const ProbeRow& find_probe(Isa isa);

}  // namespace gossamer
