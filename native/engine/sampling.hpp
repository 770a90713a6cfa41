// The choice of the next token from a row of logits.
#pragma once

#include <span>

#include "kernels/table.hpp"

namespace gossamer {

struct SamplingOptions {
    double temperature;  // above 0
    int top_k;           // 0: all
    double top_p;        // 1: all
    double min_p;        // 0: all
};

// The token that a uniform number in [0, 1) draws from the softmax of logits / temperature, after
// transformers' filters in their order: top-k keeps the k highest and those equal to the k-th; top-p the
// fewest highest whose probabilities reach p; min-p those at least p times as probable as the highest. Tokens
// lie in the order of their ids. EngineError when a logit is NaN or +inf, or none is finite.
int sample(const SamplingKernels& kernels, std::span<const float> logits, const SamplingOptions& options,
           double uniform);

// Natural logarithm of the softmax of logits at `index`, within 1e-6.
double log_probability(const SamplingKernels& kernels, std::span<const float> logits, int index);

}  // namespace gossamer
