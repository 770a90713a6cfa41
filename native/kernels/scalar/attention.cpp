// Attention of new tokens, for the query heads that share a key/value head, over the positions in the cache,
// with online softmax over chunks of 256 positions: the specification.
//
//   s[p] = sum_e (scale q[e]) k[p, e];   m = max s;   w[p] = exp(s[p] - m);   l = sum_p w[p]
//   o[e] = sum_p w[p] v[p, e];   chunk after chunk (m, l, o) are merged;   out[e] = o[e] / l
//
// p are the positions that the token sees: in a decoder its own and those before it, or the last `window` of
// them; in an encoder all, or a window of them that the token is in the middle of. Up to the first of them,
// the chunk in which it lies has w[p] = 0.
//
// A row is one query head of one token. Chunks are cut at multiples of 256 positions and merged in order, and
// sums run in order over e and p, so a row's result depends neither on the other rows nor on how work was
// split. The sum of weights l runs in 16 lanes, which are halved four times.
//
//   f32, bf16  A sum is one chain of fused multiply-adds.
//   i8         A row of queries becomes 16-bit integers with one step, max / 32639, and so do the chunk's w
//              times the scales of the values; both sums are exact int32.
//
// Every level but amx gives the same bits.

#include <bit>

#include "kernels/attention_task.hpp"

namespace gossamer {

using namespace attention;

std::size_t attention_state_floats(int head_dim) { return std::size_t(padded(head_dim)) + kLanes; }

std::size_t attention_scratch_floats(int num_rows, int head_dim) {
    const std::size_t states = 2 * attention_state_floats(head_dim);
    return std::size_t(num_rows) * (std::size_t(padded(head_dim)) + kChunkPositions + states + 4);
}

void merge_attention(const float* states, std::size_t stride, int num_chunks, int head_dim, float* out_E) {
    float* state = const_cast<float*>(states);
    for (int chunk = 1; chunk < num_chunks; ++chunk)
        merge(state, states + std::size_t(chunk) * stride, padded(head_dim));
    finish(state, head_dim, out_E);
}

namespace scalar {
namespace {

struct F32 {
    static constexpr int kInputs = 1;
    static float at(const std::uint8_t* vector, int index) {
        return reinterpret_cast<const float*>(vector)[index];
    }
};

struct Bf16 {
    static constexpr int kInputs = 2;
    static float at(const std::uint8_t* vector, int index) {
        return std::bit_cast<float>(std::uint32_t(reinterpret_cast<const std::uint16_t*>(vector)[index])
                                    << 16);
    }
};

struct I8 {
    static constexpr int kInputs = 4;
    static std::int32_t at(const std::uint8_t* vector, int index) { return vector[index] - 128; }
};

// The number in column `row` of a block, at input `input`.
template <class T>
auto number(const std::uint8_t* vectors, std::size_t step_bytes, int row, int input) {
    return T::at(vectors + std::size_t(input / T::kInputs) * step_bytes,
                 row * T::kInputs + input % T::kInputs);
}

// sum_i a[i] b[row, i]; i8: a becomes 16-bit integers first.
template <class T>
float product(const float* a, int count, const std::uint8_t* vectors, std::size_t step_bytes, int row) {
    if constexpr (T::kInputs < 4) {
        float sum = 0;
        for (int i = 0; i < count; ++i) sum = std::fma(a[i], number<T>(vectors, step_bytes, row, i), sum);
        return sum;
    } else {
        float largest = 0;
        for (int i = 0; i < count; ++i) largest = std::max(largest, std::abs(a[i]));
        const float inverse = largest > 0 ? kLargest16 / largest : 0;
        std::int32_t sum = 0;
        for (int i = 0; i < count; ++i)
            sum += std::int32_t(std::lrintf(a[i] * inverse)) * number<T>(vectors, step_bytes, row, i);
        return float(sum) * (largest / kLargest16);
    }
}

// The state of one row after one chunk.
template <class T>
void attend(const KvLayout& layout, const std::uint8_t* chunk, const float* q_E, Seen seen, float* state) {
    const int E = layout.head_dim, width = padded(E);
    const float* scales = reinterpret_cast<const float*>(chunk);
    float weights[kChunkPositions], lanes[kLanes] = {};
    for (int p = seen.begin; p < seen.end; ++p) {
        const std::uint8_t* keys = chunk + layout.key_block(p / kKvBlock);
        weights[p] = product<T>(q_E, E, keys, layout.key_step_bytes(), p % kKvBlock);
        if (T::kInputs == 4) weights[p] *= scales[p];
    }
    const float largest = *std::max_element(weights + seen.begin, weights + seen.end);
    std::fill_n(weights, seen.begin, 0.0f);
    for (int p = seen.begin; p < seen.end; ++p) {
        weights[p] = exponential_of(weights[p] - largest);
        lanes[p % kLanes] += weights[p];
        if (T::kInputs == 4) weights[p] *= scales[kChunkPositions + p];
    }
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    for (int e = 0; e < E; ++e) {
        const std::uint8_t* values = chunk + layout.value_block(e / kKvBlock);
        state[e] = product<T>(weights, seen.end, values, layout.value_step_bytes(e / kKvBlock), e % kKvBlock);
    }
    state[width] = largest;
    state[width + 1] = lanes[0];
}

template <class T>
void attention(const AttentionTask& task) {
    const int E = task.layout.head_dim;
    float *q_E = task.scratch, *state = q_E + E, *next = state + attention_state_floats(E);
    for (int row = 0; row < task.num_tokens * task.num_heads; ++row) {
        const int token = row / task.num_heads, head = row % task.num_heads;
        const std::size_t begin = token * task.stride + std::size_t(head) * E;
        for (int e = 0; e < E; ++e) q_E[e] = task.q[begin + e] * task.scale;
        if (task.state) state = task.state + row * attention_state_floats(E);
        for (int c = task.begin; c < task.end && seen(task, c, token).end > 0; ++c) {
            const std::uint8_t* chunk = task.chunks[c] + task.head_begin;
            attend<T>(task.layout, chunk, q_E, seen(task, c, token), c == task.begin ? state : next);
            if (c != task.begin) merge(state, next, padded(E));
        }
        if (!task.state) finish(state, E, task.out + begin);
    }
}

}  // namespace

void attention_f32(const AttentionTask& task) { attention<F32>(task); }
void attention_bf16(const AttentionTask& task) { attention<Bf16>(task); }
void attention_i8(const AttentionTask& task) { attention<I8>(task); }

}  // namespace scalar

}  // namespace gossamer
