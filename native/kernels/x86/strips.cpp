// Products of training with a fixed mask, by vectors: see ../scalar/strips.cpp.
//
// `multiply` holds a row's 64 sums in registers, `project` its 64 deltas. Each value costs one load of its
// input for each vector either way, so that one multiply-add goes with one load: the bound is the load port,
// about 85% of the peak on Zen 4 (dense products of torch reach 60% there). What sparsity adds to a row is
// its sums or deltas coming from L2, and the end of a loop whose length nobody can predict.

#include "kernels/kernels.hpp"
#include "kernels/x86/target.hpp"

namespace gossamer {

constexpr int T = kTileTokens;

GOSSAMER_BEGIN_AVX2
namespace avx2 {
namespace {

constexpr int kVectors = T / 8;

inline __m256 dot(const __m256 (&delta)[kVectors], const float* x) {
    __m256 sum = _mm256_mul_ps(delta[0], _mm256_load_ps(x));
    for (int i = 1; i < kVectors; ++i) sum = _mm256_fmadd_ps(delta[i], _mm256_load_ps(x + 8 * i), sum);
    return sum;
}

// The sum of each of four vectors.
inline __m128 sums(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256 four = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    return _mm_add_ps(_mm256_castps256_ps128(four), _mm256_extractf128_ps(four, 1));
}

}  // namespace

void multiply(const Strip& strip, const float* in, float* out) {
    const float* value = strip.values;
    const std::uint8_t* index = strip.index;
    for (int row = 0; row < strip.rows; ++row, out += T) {
        __m256 sum[kVectors];
        for (int i = 0; i < kVectors; ++i) sum[i] = _mm256_load_ps(out + 8 * i);
        for (int left = strip.counts[row]; left > 0; --left, ++value, ++index) {
            const __m256 w = _mm256_set1_ps(*value);
            const float* x = in + std::size_t(*index) * T;
            for (int i = 0; i < kVectors; ++i) sum[i] = _mm256_fmadd_ps(w, _mm256_load_ps(x + 8 * i), sum[i]);
        }
        for (int i = 0; i < kVectors; ++i) _mm256_store_ps(out + 8 * i, sum[i]);
    }
}

void project(const Strip& strip, const float* in, const float* delta, float* gradient) {
    const std::uint8_t* index = strip.index;
    for (int row = 0; row < strip.rows; ++row, delta += T) {
        __m256 d[kVectors];
        for (int i = 0; i < kVectors; ++i) d[i] = _mm256_load_ps(delta + 8 * i);
        int left = strip.counts[row];
        const auto input = [&](int i) { return in + std::size_t(index[i]) * T; };
        for (; left >= 4; left -= 4, index += 4, gradient += 4) {
            const __m128 four = sums(dot(d, input(0)), dot(d, input(1)), dot(d, input(2)), dot(d, input(3)));
            _mm_storeu_ps(gradient, _mm_add_ps(_mm_loadu_ps(gradient), four));
        }
        for (; left > 0; --left, ++index, ++gradient) {
            const __m256 one = dot(d, input(0));
            *gradient += _mm_cvtss_f32(sums(one, one, one, one));
        }
    }
}

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

constexpr int kVectors = T / 16;

inline __m512 dot(const __m512 (&delta)[kVectors], const float* x) {
    __m512 sum = _mm512_mul_ps(delta[0], _mm512_load_ps(x));
    for (int i = 1; i < kVectors; ++i) sum = _mm512_fmadd_ps(delta[i], _mm512_load_ps(x + 16 * i), sum);
    return sum;
}

// Neighbouring floats (pairs) of a and b added: half as many of each, side by side.
inline __m512 add_floats(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}
inline __m512 add_pairs(__m512 a, __m512 b) {
    const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
    return _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)),
                         _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
}

// The sum of each of four vectors.
inline __m128 sums(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 four = add_pairs(add_floats(a, b), add_floats(c, d));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(four), _mm512_extractf32x8_ps(four, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

}  // namespace

void multiply(const Strip& strip, const float* in, float* out) {
    const float* value = strip.values;
    const std::uint8_t* index = strip.index;
    for (int row = 0; row < strip.rows; ++row, out += T) {
        __m512 sum[kVectors];
        for (int i = 0; i < kVectors; ++i) sum[i] = _mm512_load_ps(out + 16 * i);
        for (int left = strip.counts[row]; left > 0; --left, ++value, ++index) {
            const __m512 w = _mm512_set1_ps(*value);
            const float* x = in + std::size_t(*index) * T;
            for (int i = 0; i < kVectors; ++i)
                sum[i] = _mm512_fmadd_ps(w, _mm512_load_ps(x + 16 * i), sum[i]);
        }
        for (int i = 0; i < kVectors; ++i) _mm512_store_ps(out + 16 * i, sum[i]);
    }
}

// Four values at a time; behind a row's last one the index names an input of the next row's (or is 0), whose
// sum is not stored.
void project(const Strip& strip, const float* in, const float* delta, float* gradient) {
    const std::uint8_t* index = strip.index;
    for (int row = 0; row < strip.rows; ++row, delta += T) {
        __m512 d[kVectors];
        for (int i = 0; i < kVectors; ++i) d[i] = _mm512_load_ps(delta + 16 * i);
        const int count = strip.counts[row];
        for (int v = 0; v < count; v += 4) {
            const auto input = [&](int i) { return in + std::size_t(index[v + i]) * T; };
            const __m128 four = sums(dot(d, input(0)), dot(d, input(1)), dot(d, input(2)), dot(d, input(3)));
            const __mmask8 stored = count - v >= 4 ? 0xF : __mmask8((1 << (count - v)) - 1);
            const __m128 before = _mm_maskz_loadu_ps(stored, gradient + v);
            _mm_mask_storeu_ps(gradient + v, stored, _mm_add_ps(before, four));
        }
        index += count;
        gradient += count;
    }
}

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
