// The loss at a language model's head: of N rows of V logits z, with a target y each, and perhaps what a
// teacher says of its K likeliest tokens (ids, log p), the temperature t and
//
//   q = softmax(z), s = softmax(z / t), p' = 1 - sum_K p, s' = sum of s over the tokens that are not among
//   the K; p' and s' are at least 1e-9
//
//   cross-entropy  -log q_y, and its weight w in the loss
//   divergence     t^2 (sum_K p log(p / s) + p' log(p' / s'))
//   gradient       w (q - [token is y]), and of the teacher t (s - p) for one of the K tokens and
//                  t s (1 - p' / s') for another
//
// as training/head_loss.py has it in torch.
#pragma once

#include <cstdint>

#include "base/team.hpp"
#include "kernels/table.hpp"

namespace gossamer {

// All arrays are row-major. Ids and targets are within [0, V), and the ids of a row are K different ones.
struct HeadLossTask {
    int N, V;
    Values values;  // of the logits: f32 or bf16
    void* logits_NV;
    const std::int64_t* targets_N;
    float weight;  // w
    bool has_teacher;
    int K;  // 0 without a teacher
    const std::int64_t* ids_NK;
    const float* log_p_NK;
    float temperature;
};

struct HeadLossSums {
    double cross_entropy, whole;
};

// Overwrites the logits by their gradient. Sums are of float64, and of the rows in their order, so that the
// number of threads changes no bit. A row whose highest logit is not finite makes NaN of itself and the sums.
HeadLossSums head_loss_sums(const HeadLossTask& task, Team& team, Isa isa);

}  // namespace gossamer
