// What choosing a token reads of a row of logits: the highest, the probability mass of those that are at
// least some value, and those between two values.
//
//   mass of x = round(2^40 exp((x - highest) / temperature))
//
// A mass is an integer, so that sums are exact: every order and every level give the same sum, and sums of
// parts add up. The highest is the `peak` of head_loss.cpp.

#include <cmath>

#include "kernels/exponential.hpp"
#include "kernels/kernels.hpp"

namespace gossamer {

constexpr float kUnit = float(kMassUnit);

namespace scalar {

float highest(const float* x, int count) { return peak_f32(x, count); }

std::uint64_t mass(const float* x, int count, const Softmax& softmax, float low) {
    std::uint64_t sum = 0;
    for (int i = 0; i < count; ++i) {
        if (x[i] < low) continue;
        const float weight = exponential_of((x[i] - softmax.highest) * softmax.inverse_temperature);
        sum += std::uint64_t(std::llrint(weight * kUnit));
    }
    return sum;
}

int keep(const float* x, int count, float low, float high, float* kept) {
    int num_kept = 0;
    for (int i = 0; i < count; ++i) {
        kept[num_kept] = x[i];
        num_kept += int(x[i] >= low) & int(x[i] < high);
    }
    return num_kept;
}

}  // namespace scalar

}  // namespace gossamer
