// The choice of the next token from a row of logits.
#pragma once

#include <span>
#include <utility>
#include <vector>

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

struct LogProbabilities {
    double of_token;
    std::vector<std::pair<int, double>> likeliest;  // the highest first, and of equals the lower id
};

// Natural logarithms of the softmax of logits, within 1e-6: at `index`, and of the `num_likeliest` tokens
// with the highest ones. EngineError as `sample`, and for an index or a number that cannot be.
LogProbabilities log_probabilities(const SamplingKernels& kernels, std::span<const float> logits, int index,
                                   int num_likeliest);

}  // namespace gossamer
