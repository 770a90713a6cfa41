// What the loss at the head does with a row of logits, by vectors: see ../scalar/head_loss.cpp.

#include <cmath>
#include <limits>

#include "kernels/head_loss.hpp"
#include "kernels/kernels.hpp"
#include "kernels/x86/bfloat16.hpp"
#include "kernels/x86/exponential.hpp"
#include "kernels/x86/target.hpp"

namespace gossamer {

using namespace head_loss;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

GOSSAMER_BEGIN_AVX2
namespace avx2 {
namespace {

constexpr int kWidth = 8;  // floats of a vector

inline __m256 load(const float* z) { return _mm256_loadu_ps(z); }
inline __m256 load(const std::uint16_t* z) { return widened(z); }
inline void store(float* z, __m256 x) { _mm256_storeu_ps(z, x); }
inline void store(std::uint16_t* z, __m256 x) { store_words(z, nearest_bf16(x)); }
inline float rest_peak(const float* z, int count) { return scalar::peak_f32(z, count); }
inline float rest_peak(const std::uint16_t* z, int count) { return scalar::peak_bf16(z, count); }
inline void rest_gradient(float* z, int count, const LogitsGradient& terms) {
    scalar::gradient_f32(z, count, terms);
}
inline void rest_gradient(std::uint16_t* z, int count, const LogitsGradient& terms) {
    scalar::gradient_bf16(z, count, terms);
}

// Every function leaves what does not fill its vectors to scalar.

template <class T>
float peak(const T* z_V, int count) {
    const int whole = count / kWidth * kWidth;
    float lanes[kWidth + 1];
    __m256 found = _mm256_set1_ps(-kInfinity), nan = _mm256_setzero_ps();
    for (int i = 0; i < whole; i += kWidth) {
        const __m256 here = load(z_V + i);
        nan = _mm256_or_ps(nan, _mm256_cmp_ps(here, here, _CMP_UNORD_Q));
        found = _mm256_max_ps(here, found);
    }
    _mm256_storeu_ps(lanes, _mm256_or_ps(found, nan));  // all bits set: NaN
    lanes[kWidth] = rest_peak(z_V + whole, count - whole);
    return scalar::peak_f32(lanes, kWidth + 1);
}

template <class T>
double total(const T* z_V, int count, const Softmax& softmax) {
    const __m256 highest = _mm256_set1_ps(softmax.highest);
    const __m256 inverse = _mm256_set1_ps(softmax.inverse_temperature);
    __m256d sums[kLanes / 4] = {};
    const int whole = count / kLanes * kLanes;
    for (int i = 0; i < whole; i += kLanes) {
        for (int half = 0; half < 2; ++half) {
            const __m256 x = _mm256_sub_ps(load(z_V + i + half * kWidth), highest);
            const __m256 power = exponential_of(_mm256_mul_ps(x, inverse));
            __m256d& low = sums[2 * half];
            __m256d& high = sums[2 * half + 1];
            low = _mm256_add_pd(low, _mm256_cvtps_pd(_mm256_castps256_ps128(power)));
            high = _mm256_add_pd(high, _mm256_cvtps_pd(_mm256_extractf128_ps(power, 1)));
        }
    }
    double lanes[kLanes];
    for (int i = 0; i < kLanes / 4; ++i) _mm256_storeu_pd(lanes + 4 * i, sums[i]);
    add_powers(z_V, whole, count, softmax, lanes);
    return sum_of(lanes);
}

inline __m256 power(__m256 x) {
    const __m256 counts = _mm256_cmp_ps(x, _mm256_set1_ps(exponential::kLow), _CMP_GE_OQ);
    return _mm256_and_ps(counts, exponential_of(x));
}

template <class T>
void gradient(T* z_V, int count, const LogitsGradient& terms) {
    const __m256 highest = _mm256_set1_ps(terms.highest), own = _mm256_set1_ps(terms.own);
    const __m256 inverse = _mm256_set1_ps(terms.inverse_temperature), soft = _mm256_set1_ps(terms.soft);
    const bool has_soft = terms.soft != 0;
    const int whole = count / kWidth * kWidth;
    for (int i = 0; i < whole; i += kWidth) {
        const __m256 x = _mm256_sub_ps(load(z_V + i), highest);
        __m256 found = _mm256_mul_ps(power(x), own);
        if (has_soft) found = _mm256_add_ps(found, _mm256_mul_ps(power(_mm256_mul_ps(x, inverse)), soft));
        store(z_V + i, found);
    }
    rest_gradient(z_V + whole, count - whole, terms);
}

}  // namespace

GOSSAMER_HEAD_LOSS(f32, float)
GOSSAMER_HEAD_LOSS(bf16, std::uint16_t)

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

inline __m512 load(const float* z, __mmask16 lanes) { return _mm512_maskz_loadu_ps(lanes, z); }
inline __m512 load(const std::uint16_t* z, __mmask16 lanes) { return widened(z, lanes); }
inline void store(float* z, __mmask16 lanes, __m512 x) { _mm512_mask_storeu_ps(z, lanes, x); }
inline void store(std::uint16_t* z, __mmask16 lanes, __m512 x) {
    _mm256_mask_storeu_epi16(z, lanes, _mm512_cvtepi32_epi16(nearest_bf16(x)));
}

template <class T>
float peak(const T* z_V, int count) {
    __m512 found = _mm512_set1_ps(-kInfinity);
    __mmask16 has_nan = 0;
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 here = load(z_V + i, lanes);
        has_nan |= _mm512_mask_cmp_ps_mask(lanes, here, here, _CMP_UNORD_Q);
        found = _mm512_mask_max_ps(found, lanes, here, found);
    }
    return has_nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(found);
}

template <class T>
double total(const T* z_V, int count, const Softmax& softmax) {
    const __m512 highest = _mm512_set1_ps(softmax.highest);
    const __m512 inverse = _mm512_set1_ps(softmax.inverse_temperature);
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 there = first_lanes(count - i);
        const __m512 x = _mm512_sub_ps(load(z_V + i, there), highest);
        const __m512 power = _mm512_maskz_mov_ps(there, exponential_of(_mm512_mul_ps(x, inverse)));
        low = _mm512_add_pd(low, _mm512_cvtps_pd(_mm512_castps512_ps256(power)));
        high = _mm512_add_pd(high, _mm512_cvtps_pd(_mm512_extractf32x8_ps(power, 1)));
    }
    double lanes[kLanes];
    _mm512_storeu_pd(lanes, low);
    _mm512_storeu_pd(lanes + 8, high);
    return sum_of(lanes);
}

// exp(x) times a factor.
inline __m512 power(__m512 x, __m512 factor) {
    const __mmask16 counts = _mm512_cmp_ps_mask(x, _mm512_set1_ps(exponential::kLow), _CMP_GE_OQ);
    return _mm512_maskz_mul_ps(counts, exponential_of(x), factor);
}

template <class T>
void gradient(T* z_V, int count, const LogitsGradient& terms) {
    const __m512 highest = _mm512_set1_ps(terms.highest), own = _mm512_set1_ps(terms.own);
    const __m512 inverse = _mm512_set1_ps(terms.inverse_temperature), soft = _mm512_set1_ps(terms.soft);
    const bool has_soft = terms.soft != 0;
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 x = _mm512_sub_ps(load(z_V + i, lanes), highest);
        __m512 found = power(x, own);
        if (has_soft) found = _mm512_add_ps(found, power(_mm512_mul_ps(x, inverse), soft));
        store(z_V + i, lanes, found);
    }
}

}  // namespace

GOSSAMER_HEAD_LOSS(f32, float)
GOSSAMER_HEAD_LOSS(bf16, std::uint16_t)

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
