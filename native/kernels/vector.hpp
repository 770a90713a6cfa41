// What surrounds the products: norms, activation functions, quantization of activations.
//
//   rmsnorm    y = weight * (x / sqrt(mean(x^2) + eps))
//              The squares are summed in float64, in 16 lanes, which are then added in order.
//   layernorm  y = weight * ((x - mean) / sqrt(mean((x - mean)^2) + eps)) + bias
//              Both means are those of float64 sums in 16 lanes, like rmsnorm's, over x and over the squares
//              of x - mean in float64. What is normalized is (x - high) - low in float32, with mean = high +
//              low; weight and bias are applied by one fused multiply-add.
//   swiglu     y = gate / (1 + exp(-gate)) * up
//   gelu       y = x / 2 (1 + erf(x / sqrt(2))) = max(x, 0) - h(|x|), h(a) = a / p(a)^8
//              p, of degree 9 and by fused multiply-adds, is a minimax fit to the eighth root that the normal
//              distribution's tail leaves it on [0, 6] (after Abramowitz and Stegun, 7.1.28), off by 8e-9 in
//              h. Beyond 6, a is taken for 6, where h is 6e-9. With rounding, y is within 1.7e-7 max(1, |x|).
//   geglu      y = gelu(gate) * up
//   largest    max |x|
//   quantize   scale = max|x| / 127.5;  q = clamp(round(x / scale), -128, 127), stored as q + 128
//              This is compressed-tensors' dynamic symmetric scheme with a scale for each token; the scale is
//              2^-23 when x is all zeros.
//   split      x = high + low, the nearest bfloat16 and that of the rest: for products on the matrix unit
//
// There are only correctly rounded operations in a stated order, so that every level gives the same bits, and
// INT8 results do not depend on which level ran. This file has what all levels share.
#pragma once

#include <cmath>

namespace gossamer::vector {

constexpr int kLanes = 16;
constexpr float kEpsilon = 1.1920929e-7f;  // 2^-23

constexpr float kGeluEnd = 6.0f;
constexpr int kGeluDegree = 9;
constexpr float kGelu[kGeluDegree + 1] = {4.20039072e-7f, -2.9039204e-6f, 1.81856994e-5f, -9.72581802e-6f,
                                          3.35576886e-4f, 8.37726926e-4f, 9.51129664e-3f, 4.879779e-2f,
                                          1.08764753e-1f, 1.09050763f};

// The mean of `count` numbers that are summed in lanes.
inline double mean_of(const double (&lanes)[kLanes], int count) {
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum / count;
}

// The mean as two floats, for a difference that is as exact as its own rounding however far the mean is from
// 0.
struct SplitMean {
    float high, low;

    explicit SplitMean(double mean) : high(float(mean)), low(float(mean - high)) {}
};

// 1 / sqrt(mean + eps) of `count` squares that are summed in lanes.
inline float inverse_rms(const double (&lanes)[kLanes], int count, float eps) {
    return 1.0f / std::sqrt(float(mean_of(lanes, count)) + eps);
}

inline float quantization_scale(float largest) {
    const float scale = largest / 127.5f;
    return scale == 0.0f ? kEpsilon : scale;
}

}  // namespace gossamer::vector
