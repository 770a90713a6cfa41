// What choosing a token reads of a row of logits: the highest, the probability mass of those from some value
// up, and those between two values.
//
//   mass of x = round(2^40 exp((x - highest) / temperature))
//
// An integer, so that sums are exact: any order and every level give the same, and sums of parts add up.

#include <cmath>
#include <limits>

#include "kernels/exponential.hpp"
#include "kernels/kernels.hpp"
#include "kernels/target.hpp"

namespace gossamer {

constexpr float kUnit = float(kMassUnit), kInfinity = std::numeric_limits<float>::infinity();

namespace scalar {

float highest(const float* x, int count) {
    float found = -kInfinity;
    bool has_nan = false;
    for (int i = 0; i < count; ++i) {
        found = x[i] > found ? x[i] : found;
        has_nan |= std::isnan(x[i]);
    }
    return has_nan ? std::numeric_limits<float>::quiet_NaN() : found;
}

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

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

constexpr int kLanes = 16;

inline __mmask16 first_lanes(int count) {
    return count >= kLanes ? __mmask16(0xFFFF) : __mmask16((1u << count) - 1);
}

}  // namespace

float highest(const float* x, int count) {
    __m512 found = _mm512_set1_ps(-kInfinity);
    __mmask16 has_nan = 0;
    for (int i = 0; i < count; i += kLanes) {
        const __m512 here = _mm512_mask_loadu_ps(found, first_lanes(count - i), x + i);
        has_nan |= _mm512_cmp_ps_mask(here, here, _CMP_UNORD_Q);
        found = _mm512_max_ps(here, found);
    }
    return has_nan ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(found);
}

std::uint64_t mass(const float* x, int count, const Softmax& softmax, float low) {
    const __m512 highest_x = _mm512_set1_ps(softmax.highest), lowest = _mm512_set1_ps(low);
    const __m512 inverse = _mm512_set1_ps(softmax.inverse_temperature), unit = _mm512_set1_ps(kUnit);
    __m512i sums = _mm512_setzero_si512();
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 here = _mm512_maskz_loadu_ps(lanes, x + i);
        const __mmask16 mask = _mm512_mask_cmp_ps_mask(lanes, here, lowest, _CMP_GE_OQ);
        if (mask == 0) continue;
        const __m512 weight = exponential_of(_mm512_mul_ps(_mm512_sub_ps(here, highest_x), inverse));
        const __m512 scaled = _mm512_maskz_mul_ps(mask, weight, unit);
        const __m512i first = _mm512_cvtps_epi64(_mm512_castps512_ps256(scaled));
        const __m512i second = _mm512_cvtps_epi64(_mm512_extractf32x8_ps(scaled, 1));
        sums = _mm512_add_epi64(sums, _mm512_add_epi64(first, second));
    }
    return std::uint64_t(_mm512_reduce_add_epi64(sums));
}

int keep(const float* x, int count, float low, float high, float* kept) {
    const __m512 lowest = _mm512_set1_ps(low), end = _mm512_set1_ps(high);
    int num_kept = 0;
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 lanes = first_lanes(count - i);
        const __m512 here = _mm512_maskz_loadu_ps(lanes, x + i);
        const __mmask16 from = _mm512_mask_cmp_ps_mask(lanes, here, lowest, _CMP_GE_OQ);
        const __mmask16 mask = _mm512_mask_cmp_ps_mask(from, here, end, _CMP_LT_OQ);
        if (mask == 0) continue;
        const int num_here = _mm_popcnt_u32(mask);
        _mm512_mask_storeu_ps(kept + num_kept, first_lanes(num_here), _mm512_maskz_compress_ps(mask, here));
        num_kept += num_here;
    }
    return num_kept;
}

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
