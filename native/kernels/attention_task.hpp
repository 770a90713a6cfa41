// What every level of attention shares: the state of a row, and where the rows of a task keep what they need.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/exponential.hpp"
#include "kernels/kernels.hpp"

namespace gossamer::attention {

constexpr int kLanes = kKvLanes;
constexpr std::size_t kAheadBytes = 12 << 10;  // prefetched: what comes next is read in this order too
constexpr float kLargest16 = 32639;            // 127 * 256 + 127: the largest that two signed bytes make

// A row's state: o [E padded to 16], then m and l.
inline int padded(int head_dim) { return int(round_up(std::size_t(head_dim), kLanes)); }

inline void merge(float* state, const float* next, int width) {
    const float largest = std::max(state[width], next[width]);
    const float a = scalar::exponential_of(state[width] - largest);
    const float b = scalar::exponential_of(next[width] - largest);
    for (int e = 0; e < width; ++e) state[e] = state[e] * a + next[e] * b;
    state[width] = largest;
    state[width + 1] = state[width + 1] * a + next[width + 1] * b;
}

inline void finish(const float* state, int head_dim, float* out_E) {
    const float sum = state[padded(head_dim) + 1];
    for (int e = 0; e < head_dim; ++e) out_E[e] = state[e] / sum;
}

// The positions of a chunk that a token sees, [begin, end); an end of 0 or less: the token comes before it.
struct Seen {
    int begin, end;
};

inline Seen seen(const AttentionTask& task, int chunk, int token) {
    const int first = chunk * kChunkPositions, end = task.position + token + 1 - first;
    return {std::max(0, end - task.window), std::min({kChunkPositions, end, task.num_positions - first})};
}

// What the wider levels keep for each row of a task.
struct Area {
    std::size_t state_stride;
    float *queries, *scores, *states;
    float* steps;           // i8: of the queries, then of the weights
    std::int32_t* offsets;  // likewise

    Area(float* scratch, int num_rows, int head_dim)
        : state_stride(attention_state_floats(head_dim)),
          queries(scratch),
          scores(queries + std::size_t(num_rows) * padded(head_dim)),
          states(scores + std::size_t(num_rows) * kChunkPositions),
          steps(states + 2 * std::size_t(num_rows) * state_stride),
          offsets(reinterpret_cast<std::int32_t*>(steps + 2 * num_rows)) {}
};

}  // namespace gossamer::attention
