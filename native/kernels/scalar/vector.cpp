// What surrounds the products, as the specification: see ../vector.hpp.

#include <algorithm>
#include <cmath>

#include "kernels/bfloat16.hpp"
#include "kernels/exponential.hpp"
#include "kernels/kernels.hpp"
#include "kernels/vector.hpp"

namespace gossamer {

using namespace vector;

namespace scalar {

float largest(const float* x, int count) {
    float found = 0;
    for (int i = 0; i < count; ++i) found = std::max(found, std::abs(x[i]));
    return found;
}

float rmsnorm(const float* x_D, const float* weight_D, float eps, int count, float* y_D) {
    double lanes[kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i % kLanes] += double(x_D[i]) * double(x_D[i]);
    const float inverse = inverse_rms(lanes, count, eps);
    for (int i = 0; i < count; ++i) y_D[i] = weight_D[i] * (x_D[i] * inverse);
    return largest(y_D, count);
}

float layernorm(const float* x_D, const float* weight_D, const float* bias_D, float eps, int count,
                float* y_D) {
    double lanes[kLanes] = {}, squares[kLanes] = {};
    for (int i = 0; i < count; ++i) lanes[i % kLanes] += double(x_D[i]);
    const double mean = mean_of(lanes, count);
    for (int i = 0; i < count; ++i) squares[i % kLanes] += (x_D[i] - mean) * (x_D[i] - mean);
    const float inverse = inverse_rms(squares, count, eps);
    const SplitMean split(mean);
    for (int i = 0; i < count; ++i)
        y_D[i] = std::fma(weight_D[i], ((x_D[i] - split.high) - split.low) * inverse, bias_D[i]);
    return largest(y_D, count);
}

float quantize(const float* x_K, int count, float largest_x, std::uint8_t* q_K) {
    const float scale = quantization_scale(largest_x);
    for (int i = 0; i < count; ++i)
        q_K[i] = std::uint8_t(std::clamp(int(std::nearbyint(x_K[i] / scale)), -128, 127) + 128);
    return scale;
}

void split(const float* x_K, int count, std::uint16_t* high_K, std::uint16_t* low_K) {
    for (int i = 0; i < count; ++i) {
        high_K[i] = nearest_bf16(x_K[i]);
        low_K[i] = nearest_bf16(x_K[i] - widened(high_K[i]));
    }
}

inline float gelu_of(float x) {
    const float a = std::min(std::abs(x), kGeluEnd);
    float p = kGelu[0];
    for (int j = 1; j <= kGeluDegree; ++j) p = std::fma(p, a, kGelu[j]);
    const float square = p * p, fourth = square * square;
    return std::max(x, 0.0f) - a / (fourth * fourth);
}

float gelu(const float* x, int count, float* y) {
    for (int i = 0; i < count; ++i) y[i] = gelu_of(x[i]);
    return largest(y, count);
}

float geglu(const float* gate, const float* up, int count, float* y) {
    for (int i = 0; i < count; ++i) y[i] = gelu_of(gate[i]) * up[i];
    return largest(y, count);
}

float swiglu(const float* gate, const float* up, int count, float* y) {
    for (int i = 0; i < count; ++i) y[i] = gate[i] / (1.0f + exponential_of(-gate[i])) * up[i];
    return largest(y, count);
}

}  // namespace scalar

}  // namespace gossamer
