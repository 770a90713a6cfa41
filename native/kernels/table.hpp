// The one table of kernels: dispatch, tests and benchmarks all go through it.
//
// It has a row for each function: what it computes, for which type and storage of weights, and at which level
// of instructions. The rows are written in list.hpp, and nowhere else. A level need not have every function:
// each is looked up by itself, at the level and then at those that it builds on.
//
// Kernels are single-threaded over the range they are given, allocate nothing and throw nothing.
#pragma once

#include <algorithm>
#include <span>

#include "base/isa.hpp"
#include "base/view.hpp"
#include "kernels/kv_layout.hpp"

namespace gossamer {

// y_TN[t * stride + n] = sum_k w_NK[n, k] x_TK[t, k] for the rows of panels [begin, end), padding rows
// included.
using Matmul = void (*)(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                        std::size_t stride);

// The exact integer sums under an i8 or i4 product: acc_TN[t, n] = sum_k w_NK[n, k] q_TK[t, k], with the
// signed q and int8 weights.
using Accumulate = void (*)(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                            std::size_t stride);

// The products that a level runs for weights of one type and storage. Here and in the structs below, each
// function is resolved by itself: it is the one of the nearest level that has it, from the level itself down
// those that it builds on.
struct MatmulKernels {
    Matmul matmul;
    Accumulate accumulate;  // i8 and i4 only
    Isa isa;                // whose `matmul` it is
};

constexpr int kNoWindow = 1 << 30;  // a window that holds every position of every sequence

// The first chunk of positions of which a token sees something, `window` positions up to its own.
inline int first_chunk(int position, int window) {
    return std::max(0, position + 1 - window) / kChunkPositions;
}

// How many tokens from `position` on have the same first chunk.
inline int same_first_chunk(int position, int window) {
    return (first_chunk(position, window) + 1) * kChunkPositions + window - 1 - position;
}

// New tokens of one sequence that attend to its cached positions at one key/value head (attention.cpp). Token
// t sees the `window` positions up to position + t, as far as these are among the sequence's `num_positions`.
struct AttentionTask {
    KvLayout layout;
    const std::uint8_t* const* chunks;  // of the sequence
    std::size_t head_begin;             // of the key/value head in each chunk
    int begin, end;                     // chunks; every token sees something of the first
    const float* q;      // rotated; row (t, h) is q[t * stride + h * head_dim], and out likewise
    float* out;          // written if `state` is null: then the chunks hold all that the tokens see
    std::size_t stride;  // floats between tokens
    int num_tokens, num_heads, position;  // heads: those that share the key/value head
    int num_positions, window;
    float scale;
    float* state;    // of each row (attention_state_floats), for merge_attention; one token, one chunk
    float* scratch;  // attention_scratch_floats
};

// What a level runs for cached keys and values of one type.
struct AttentionKernels {
    void (*attention)(const AttentionTask& task);
};

std::size_t attention_state_floats(int head_dim);
std::size_t attention_scratch_floats(int num_rows, int head_dim);

// out_E of one row from its states after chunks 0 .. num_chunks - 1, each `stride` floats behind the last.
void merge_attention(const float* states, std::size_t stride, int num_chunks, int head_dim, float* out_E);

// Everything that surrounds the matrix products (vector.cpp, rope.cpp). All levels give the same bits.
struct VectorKernels {
    // These return max|y|, so that quantizing y reads it only once more. y may be x: the norms of queries and
    // keys run in place, and so do those that follow a sublayer.
    float (*rmsnorm)(const float* x_D, const float* weight_D, float eps, int count, float* y_D);
    float (*layernorm)(const float* x_D, const float* weight_D, const float* bias_D, float eps, int count,
                       float* y_D);
    float (*gelu)(const float* x, int count, float* y);  // NaN stays NaN, but is not counted in max|y|
    float (*geglu)(const float* gate, const float* up, int count, float* y);   // y may be gate
    float (*swiglu)(const float* gate, const float* up, int count, float* y);  // y may be gate
    float (*largest)(const float* x, int count);                               // max|x|
    // Writes q + 128 and returns the scale, max|x| / 127.5.
    float (*quantize)(const float* x_K, int count, float largest, std::uint8_t* q_K);
    // x = high + low, two bfloat16.
    void (*split)(const float* x_K, int count, std::uint16_t* high_K, std::uint16_t* low_K);
    // Rotates heads [head][E] of one token in place by cos_sin [2][E / 2]: the halves a and b of each head
    // become a cos - b sin and b cos + a sin.
    void (*rope)(float* x_HE, int num_heads, int head_dim, const float* cos_sin);
};

// exp((x - highest) / temperature).
struct Softmax {
    float highest, inverse_temperature;
};

constexpr std::uint64_t kMassUnit = std::uint64_t(1) << 40;

// What choosing a token reads of a row of logits (sampling.cpp); every level gives the same.
struct SamplingKernels {
    float (*highest)(const float* x, int count);  // NaN when one is
    // The sum of round(kMassUnit softmax(x)) over the x that are at least `low`; none is above `highest`.
    std::uint64_t (*mass)(const float* x, int count, const Softmax& softmax, float low);
    // Copies those with low <= x < high, in order, to another place with room for all; returns how many.
    int (*keep)(const float* x, int count, float low, float high, float* kept);
};

// The factors of one step of AdamW (adamw.cpp).
struct AdamwStep {
    float take1;         // 1 - beta1
    float keep2, take2;  // beta2, 1 - beta2
    float shrink;        // 1 - learning rate * weight decay
    float rate;          // learning rate / (1 - beta1^t)
    float correction2;   // sqrt(1 - beta2^t)
    float eps;
};

// One step of AdamW (adamw.cpp), in place. Every level gives the same bits.
struct AdamwKernels {
    void (*adamw)(const AdamwStep& step, const float* gradient, std::size_t count, float* exp_avg,
                  float* exp_avg_sq, float* weight);
};

// What is written over a row of logits: own exp(x - highest) + soft exp((x - highest) inverse_temperature).
struct LogitsGradient {
    float highest, own, soft, inverse_temperature;
};

// What the loss at the head does with a row of V logits of one type, f32 or bf16 (head_loss.cpp). Every level
// gives the same bits.
struct HeadLossKernels {
    float (*peak)(const void* z_V, int count);  // the highest; NaN when one is
    // The sum of exp((z - highest) inverse_temperature), in float64; all are finite or -inf.
    double (*total)(const void* z_V, int count, const Softmax& softmax);
    void (*gradient)(void* z_V, int count, const LogitsGradient& terms);
};

constexpr int kSweepLanes = 32;  // outputs that a sweep takes at once

// A block of inputs that are fixed one after another (sweep.hpp). `stride` elements lie between the inputs of
// weights, marks and errors, `u_stride` between the rows of U.
struct SweepTask {
    int num_inputs;  // B
    std::size_t stride, u_stride;
    const float* u_BB;
    const std::uint8_t* kept_BN;  // 1: the weight stays, or may round to something
    const float* scale_N;         // of each output, to round to; null: nothing is rounded
    float largest;                // whole number of scales (L), such as 127 of int8
    float* w_BN;                  // in place
    float* error_BN;              // written: what is left to make up for, over U_jj
};

// The outputs [begin, end) of a block; `scratch` holds kSweepLanes floats for each input. Every level gives
// the same bits.
struct SweepKernels {
    void (*sweep)(const SweepTask& task, int begin, int end, float* scratch);
};

// Rows of a strip of a masked matrix: `counts` values each, `index` their inputs within the strip. Four
// bytes of `index` behind the last one can be read.
struct Strip {
    const float* values;
    const std::uint8_t* index;
    const std::uint8_t* counts;
    int rows;
};

constexpr int kTileTokens = 64, kStripInputs = 96;

// Products of training, over tiles in which tokens are contiguous (strips.cpp): in is [96][64], out and
// delta are [rows][64], gradient has one number a value; all begin at multiples of 64 bytes but the
// gradient.
struct TrainingKernels {
    void (*multiply)(const Strip& strip, const float* in, float* out);
    void (*project)(const Strip& strip, const float* in, const float* delta, float* gradient);
};

// What the machine can do at best (probes.cpp).
struct ProbeKernels {
    // Sums `count` bytes (a multiple of 256), touching each cache line once.
    std::uint64_t (*read)(const std::uint8_t* data, std::size_t count, std::size_t prefetch_bytes);
    // Multiply in registers; return how many multiply-adds that were.
    std::uint64_t (*multiply_int8)(std::uint64_t rounds);
    std::uint64_t (*multiply_f32)(std::uint64_t rounds);
};

// A row of the table.
struct Kernel {
    const char* family;  // what the function is called
    Values values;       // of weights, or of cached keys and values; f32 where there are neither
    Storage storage;
    Isa isa;
};

std::span<const Kernel> kernels();

// What a level runs. The references stay valid.
const MatmulKernels& find_matmul(Storage storage, Values values, Isa isa);
const AttentionKernels& find_attention(Values values, Isa isa);
const VectorKernels& find_vector(Isa isa);
const SamplingKernels& find_sampling(Isa isa);
const AdamwKernels& find_adamw(Isa isa);
const HeadLossKernels& find_head_loss(Values values, Isa isa);
const SweepKernels& find_sweep(Isa isa);
const TrainingKernels& find_training(Isa isa);
const ProbeKernels& find_probe(Isa isa);

}  // namespace gossamer
