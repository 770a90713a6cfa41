// The inner loop of SparseGPT and GPTQ: the inputs of a block are fixed one after another, and those behind
// make up for each (compress/hessian.py has where it comes from). Every output is for itself:
//
//   fixed_j = kept_j ? w_j : 0                                               pruning
//           = clamp(round(w_j / scale), -L, L) scale, 0 unless kept_j        rounding on the output's scale
//   error_j = (w_j - fixed_j) / U_jj
//   w_i     = w_i - U_ji error_j     for the i behind j
//   w_j     = fixed_j
//
// Every operation is float32, correctly rounded and in this order, so that all levels, and any split over
// threads, give the same bits. Outputs are taken in strips whose weights are copied together, because the
// rows of a matrix that is a power of two wide lie on the same few lines of a cache.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "kernels/table.hpp"

namespace gossamer::sweep {

constexpr int kLanes = kSweepLanes;

[[gnu::always_inline]] inline void fix(const SweepTask& task, int j, int first, int count, float* row,
                                       float* error) {
    const std::uint8_t* kept = task.kept_BN + j * task.stride + first;
    const float pivot = task.u_BB[j * task.u_stride + j], largest = task.largest;
    alignas(64) float fixed[kLanes] = {};
    if (task.scale_N) {
        for (int n = 0; n < count; ++n) {
            const float scale = task.scale_N[first + n];
            const float whole = std::clamp(std::nearbyint(row[n] / scale), -largest, largest);
            fixed[n] = kept[n] ? whole * scale : 0.0f;
        }
    } else {
        for (int n = 0; n < count; ++n) fixed[n] = kept[n] ? row[n] : 0.0f;
    }
    for (int n = 0; n < kLanes; ++n) error[n] = (row[n] - fixed[n]) / pivot;
    for (int n = 0; n < kLanes; ++n) row[n] = fixed[n];
}

[[gnu::always_inline]] inline void strip(const SweepTask& task, int first, int count, float* w) {
    const int B = task.num_inputs;
    for (int j = 0; j < B; ++j) {
        std::copy_n(task.w_BN + j * task.stride + first, count, w + j * kLanes);
        std::fill(w + j * kLanes + count, w + (j + 1) * kLanes, 0.0f);
    }
    for (int j = 0; j < B; ++j) {
        alignas(64) float error[kLanes];
        fix(task, j, first, count, w + j * kLanes, error);
        const float* u = task.u_BB + j * task.u_stride;
        for (int i = j + 1; i < B; ++i) {
            float* row = w + i * kLanes;
            for (int n = 0; n < kLanes; ++n) row[n] = row[n] - u[i] * error[n];
        }
        std::copy_n(error, count, task.error_BN + j * task.stride + first);
    }
    for (int j = 0; j < B; ++j) std::copy_n(w + j * kLanes, count, task.w_BN + j * task.stride + first);
}

[[gnu::always_inline]] inline void sweep(const SweepTask& task, int begin, int end, float* scratch) {
    for (int first = begin; first < end; first += kLanes)
        strip(task, first, std::min(kLanes, end - first), scratch);
}

}  // namespace gossamer::sweep
