// What the loss at the head does with a row z of V logits (training/head_loss.hpp says what it is made of).
//
//   peak      max z; NaN when one is
//   total     sum of exp((z - highest) / temperature)
//   gradient  z = own exp(z - highest) + soft exp((z - highest) / temperature), where exp of less than -87
//             is 0; the second term only if soft is not 0
//
// Logits are float32, or bfloat16, which are widened, and rounded once, to the nearest, when they are
// written. exp is that of exponential.hpp. A total is summed in float64, in 16 lanes, which are then added in
// order. All else is float32, correctly rounded and in the order written, so that all levels give the same
// bits.
//
// The bound is arithmetic: some 25 instructions for a vector of exponentials, of a row that stays in a cache.

#include <cmath>
#include <limits>

#include "kernels/head_loss.hpp"
#include "kernels/kernels.hpp"

namespace gossamer {

using namespace head_loss;

namespace scalar {
namespace {

template <class T>
float peak(const T* z_V, int count) {
    float found = -std::numeric_limits<float>::infinity();
    bool has_nan = false;
    for (int i = 0; i < count; ++i) {
        const float x = number(z_V[i]);
        found = x > found ? x : found;
        has_nan |= std::isnan(x);
    }
    return has_nan ? std::numeric_limits<float>::quiet_NaN() : found;
}

template <class T>
double total(const T* z_V, int count, const Softmax& softmax) {
    double lanes[kLanes] = {};
    add_powers(z_V, 0, count, softmax, lanes);
    return sum_of(lanes);
}

float power(float x) { return x < exponential::kLow ? 0.0f : exponential_of(x); }
void store(float* z, float x) { *z = x; }
void store(std::uint16_t* z, float x) { *z = nearest_bf16(x); }

template <class T>
void gradient(T* z_V, int count, const LogitsGradient& terms) {
    for (int i = 0; i < count; ++i) {
        const float x = number(z_V[i]) - terms.highest;
        float found = power(x) * terms.own;
        if (terms.soft != 0) found = found + power(x * terms.inverse_temperature) * terms.soft;
        store(z_V + i, found);
    }
}

}  // namespace

GOSSAMER_HEAD_LOSS(f32, float)
GOSSAMER_HEAD_LOSS(bf16, std::uint16_t)

}  // namespace scalar

}  // namespace gossamer
