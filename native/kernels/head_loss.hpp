// What levels share of the loss at the head: see scalar/head_loss.cpp.
#pragma once

#include "kernels/bfloat16.hpp"
#include "kernels/exponential.hpp"
#include "kernels/table.hpp"

namespace gossamer::head_loss {

constexpr int kLanes = 16;  // of a total: element i is added to lane i % 16

inline float number(float z) { return z; }
inline float number(std::uint16_t z) { return scalar::widened(z); }

// Adds the elements [begin, count) to their lanes.
template <class T>
void add_powers(const T* z_V, int begin, int count, const Softmax& softmax, double (&lanes)[kLanes]) {
    for (int i = begin; i < count; ++i) {
        const float x = (number(z_V[i]) - softmax.highest) * softmax.inverse_temperature;
        lanes[i % kLanes] += double(scalar::exponential_of(x));
    }
}

inline double sum_of(const double (&lanes)[kLanes]) {
    double sum = 0;
    for (double lane : lanes) sum += lane;
    return sum;
}

}  // namespace gossamer::head_loss

// Defines the functions of the list for logits of type T by the templates of the file that uses this.
#define GOSSAMER_HEAD_LOSS(values, T)                                                                   \
    float peak_##values(const void* z_V, int count) { return peak(static_cast<const T*>(z_V), count); } \
    double total_##values(const void* z_V, int count, const Softmax& softmax) {                         \
        return total(static_cast<const T*>(z_V), count, softmax);                                       \
    }                                                                                                   \
    void gradient_##values(void* z_V, int count, const LogitsGradient& terms) {                         \
        gradient(static_cast<T*>(z_V), count, terms);                                                   \
    }
