// What surrounds the products: RMSNorm, quantization of activations, SwiGLU.
//
//   rmsnorm    y = weight * (x / sqrt(mean(x^2) + eps))
//              The squares are summed in float64, in 16 lanes, which are then added in order.
//   swiglu     y = gate / (1 + exp(-gate)) * up
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

// 1 / sqrt(mean + eps) of `count` squares that are summed in lanes.
inline float inverse_rms(const double (&lanes)[kLanes], int count, float eps) {
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return 1.0f / std::sqrt(float(sum / count) + eps);
}

inline float quantization_scale(float largest) {
    const float scale = largest / 127.5f;
    return scale == 0.0f ? kEpsilon : scale;
}

}  // namespace gossamer::vector
