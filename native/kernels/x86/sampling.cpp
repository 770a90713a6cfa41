// What choosing a token reads of a row of logits, by vectors: see ../scalar/sampling.cpp.

#include "kernels/kernels.hpp"
#include "kernels/x86/exponential.hpp"
#include "kernels/x86/target.hpp"

namespace gossamer {

constexpr float kUnit = float(kMassUnit);

GOSSAMER_BEGIN_AVX2
namespace avx2 {
namespace {

constexpr int kLanes = 8;
constexpr double kInteger =
    4503599627370496.0;  // 2^52: a smaller number added to it is rounded, in its low bits

inline __m256i rounded(__m128 x) {
    return _mm256_castpd_si256(_mm256_add_pd(_mm256_cvtps_pd(x), _mm256_set1_pd(kInteger)));
}

}  // namespace

float highest(const float* x, int count) { return peak_f32(x, count); }

std::uint64_t mass(const float* x, int count, const Softmax& softmax, float low) {
    const __m256 highest_x = _mm256_set1_ps(softmax.highest), lowest = _mm256_set1_ps(low);
    const __m256 inverse = _mm256_set1_ps(softmax.inverse_temperature), unit = _mm256_set1_ps(kUnit);
    const __m256i zero = _mm256_castpd_si256(_mm256_set1_pd(kInteger));
    const int whole = count / kLanes * kLanes;
    __m256i sums = _mm256_setzero_si256();
    for (int i = 0; i < whole; i += kLanes) {
        const __m256 here = _mm256_loadu_ps(x + i);
        const __m256 mask = _mm256_cmp_ps(here, lowest, _CMP_GE_OQ);
        if (_mm256_movemask_ps(mask) == 0) continue;
        const __m256 weight = exponential_of(_mm256_mul_ps(_mm256_sub_ps(here, highest_x), inverse));
        const __m256 scaled = _mm256_and_ps(mask, _mm256_mul_ps(weight, unit));
        const __m256i first = _mm256_sub_epi64(rounded(_mm256_castps256_ps128(scaled)), zero);
        const __m256i second = _mm256_sub_epi64(rounded(_mm256_extractf128_ps(scaled, 1)), zero);
        sums = _mm256_add_epi64(sums, _mm256_add_epi64(first, second));
    }
    std::uint64_t lanes[4];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), sums);
    const std::uint64_t rest = scalar::mass(x + whole, count - whole, softmax, low);
    return lanes[0] + lanes[1] + lanes[2] + lanes[3] + rest;
}

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

constexpr int kLanes = 16;

}  // namespace

float highest(const float* x, int count) { return peak_f32(x, count); }

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
