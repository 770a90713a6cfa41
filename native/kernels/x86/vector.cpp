// What surrounds the products, by vectors: see ../vector.hpp.

#include <algorithm>
#include <cmath>

#include "kernels/kernels.hpp"
#include "kernels/vector.hpp"
#include "kernels/x86/bfloat16.hpp"
#include "kernels/x86/exponential.hpp"
#include "kernels/x86/target.hpp"

namespace gossamer {

using namespace vector;

GOSSAMER_BEGIN_AVX2
namespace avx2 {
namespace {

constexpr int kWidth = 8;  // floats of a vector

inline __m256 magnitude(__m256 x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }

inline float largest_of(__m256 x) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

// sum + x^2 of four floats, in float64.
inline __m256d add_square(__m256d sum, __m128 x) {
    const __m256d wide = _mm256_cvtps_pd(x);
    return _mm256_add_pd(sum, _mm256_mul_pd(wide, wide));
}

// x - mean of four floats, in float64.
inline __m256d centered(const float* x, double mean) {
    return _mm256_sub_pd(_mm256_cvtps_pd(_mm_loadu_ps(x)), _mm256_set1_pd(mean));
}

inline __m256 gelu_of(__m256 x) {
    const __m256 a = _mm256_min_ps(_mm256_set1_ps(kGeluEnd), magnitude(x));
    __m256 p = _mm256_set1_ps(kGelu[0]);
    for (int j = 1; j <= kGeluDegree; ++j) p = _mm256_fmadd_ps(p, a, _mm256_set1_ps(kGelu[j]));
    const __m256 square = _mm256_mul_ps(p, p), fourth = _mm256_mul_ps(square, square);
    const __m256 h = _mm256_div_ps(a, _mm256_mul_ps(fourth, fourth));
    return _mm256_sub_ps(_mm256_max_ps(_mm256_setzero_ps(), x), h);
}

// The nearest integers of x / divisor.
inline __m256i steps(const float* x, __m256 divisor) {
    return _mm256_cvtps_epi32(_mm256_div_ps(_mm256_loadu_ps(x), divisor));
}

}  // namespace

// Every function leaves what does not fill its vectors to scalar.

float largest(const float* x, int count) {
    __m256 found = _mm256_setzero_ps(), other = found;
    int i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
        found = _mm256_max_ps(magnitude(_mm256_loadu_ps(x + i)), found);
        other = _mm256_max_ps(magnitude(_mm256_loadu_ps(x + i + kWidth)), other);
    }
    return std::max(largest_of(_mm256_max_ps(found, other)), scalar::largest(x + i, count - i));
}

float rmsnorm(const float* x_D, const float* weight_D, float eps, int count, float* y_D) {
    __m256d sums[4] = {};
    int i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        for (int j = 0; j < 4; ++j) sums[j] = add_square(sums[j], _mm_loadu_ps(x_D + i + 4 * j));
    }
    double lanes[kLanes];
    for (int j = 0; j < 4; ++j) _mm256_storeu_pd(lanes + 4 * j, sums[j]);
    for (; i < count; ++i) lanes[i % kLanes] += double(x_D[i]) * double(x_D[i]);
    const float inverse = inverse_rms(lanes, count, eps);
    __m256 found = _mm256_setzero_ps();
    for (i = 0; i + kWidth <= count; i += kWidth) {
        const __m256 x = _mm256_mul_ps(_mm256_loadu_ps(x_D + i), _mm256_set1_ps(inverse));
        const __m256 y = _mm256_mul_ps(_mm256_loadu_ps(weight_D + i), x);
        _mm256_storeu_ps(y_D + i, y);
        found = _mm256_max_ps(magnitude(y), found);
    }
    const int rest = i;
    for (; i < count; ++i) y_D[i] = weight_D[i] * (x_D[i] * inverse);
    return std::max(largest_of(found), scalar::largest(y_D + rest, count - rest));
}

float layernorm(const float* x_D, const float* weight_D, const float* bias_D, float eps, int count,
                float* y_D) {
    __m256d sums[4] = {}, squares[4] = {};
    double lanes[kLanes];
    const int whole = count / kLanes * kLanes;
    for (int i = 0; i < whole; i += kLanes) {
        for (int j = 0; j < 4; ++j)
            sums[j] = _mm256_add_pd(sums[j], _mm256_cvtps_pd(_mm_loadu_ps(x_D + i + 4 * j)));
    }
    for (int j = 0; j < 4; ++j) _mm256_storeu_pd(lanes + 4 * j, sums[j]);
    for (int i = whole; i < count; ++i) lanes[i % kLanes] += double(x_D[i]);
    const double mean = mean_of(lanes, count);
    for (int i = 0; i < whole; i += kLanes) {
        for (int j = 0; j < 4; ++j) {
            const __m256d x = centered(x_D + i + 4 * j, mean);
            squares[j] = _mm256_add_pd(squares[j], _mm256_mul_pd(x, x));
        }
    }
    for (int j = 0; j < 4; ++j) _mm256_storeu_pd(lanes + 4 * j, squares[j]);
    for (int i = whole; i < count; ++i) lanes[i % kLanes] += (x_D[i] - mean) * (x_D[i] - mean);
    const SplitMean split(mean);
    const float inverse = inverse_rms(lanes, count, eps);
    __m256 found = _mm256_setzero_ps();
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const __m256 high = _mm256_sub_ps(_mm256_loadu_ps(x_D + i), _mm256_set1_ps(split.high));
        const __m256 x = _mm256_sub_ps(high, _mm256_set1_ps(split.low));
        const __m256 scaled = _mm256_mul_ps(x, _mm256_set1_ps(inverse));
        const __m256 y = _mm256_fmadd_ps(_mm256_loadu_ps(weight_D + i), scaled, _mm256_loadu_ps(bias_D + i));
        _mm256_storeu_ps(y_D + i, y);
        found = _mm256_max_ps(magnitude(y), found);
    }
    const int rest = i;
    for (; i < count; ++i)
        y_D[i] = std::fma(weight_D[i], ((x_D[i] - split.high) - split.low) * inverse, bias_D[i]);
    return std::max(largest_of(found), scalar::largest(y_D + rest, count - rest));
}

float quantize(const float* x_K, int count, float largest_x, std::uint8_t* q_K) {
    const __m256 divisor = _mm256_set1_ps(quantization_scale(largest_x));
    int i = 0;
    for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
        // Packing saturates, and takes turns with the halves of its operands.
        const __m256i mixed = _mm256_packs_epi32(steps(x_K + i, divisor), steps(x_K + i + kWidth, divisor));
        const __m256i words = _mm256_permute4x64_epi64(mixed, _MM_SHUFFLE(3, 1, 2, 0));
        const __m128i bytes =
            _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(q_K + i), _mm_xor_si128(bytes, _mm_set1_epi8(-128)));
    }
    return scalar::quantize(x_K + i, count - i, largest_x, q_K + i);
}

void split(const float* x_K, int count, std::uint16_t* high_K, std::uint16_t* low_K) {
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const __m256 x = _mm256_loadu_ps(x_K + i);
        const __m256i high = nearest_bf16(x);
        store_words(high_K + i, high);
        const __m256 rest = _mm256_sub_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(high, 16)));
        store_words(low_K + i, nearest_bf16(rest));
    }
    scalar::split(x_K + i, count - i, high_K + i, low_K + i);
}

float gelu(const float* x, int count, float* y) {
    __m256 found = _mm256_setzero_ps();
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const __m256 result = gelu_of(_mm256_loadu_ps(x + i));
        _mm256_storeu_ps(y + i, result);
        found = _mm256_max_ps(magnitude(result), found);
    }
    return std::max(largest_of(found), scalar::gelu(x + i, count - i, y + i));
}

float geglu(const float* gate, const float* up, int count, float* y) {
    __m256 found = _mm256_setzero_ps();
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const __m256 result = _mm256_mul_ps(gelu_of(_mm256_loadu_ps(gate + i)), _mm256_loadu_ps(up + i));
        _mm256_storeu_ps(y + i, result);
        found = _mm256_max_ps(magnitude(result), found);
    }
    return std::max(largest_of(found), scalar::geglu(gate + i, up + i, count - i, y + i));
}

float swiglu(const float* gate, const float* up, int count, float* y) {
    __m256 found = _mm256_setzero_ps();
    int i = 0;
    for (; i + kWidth <= count; i += kWidth) {
        const __m256 g = _mm256_loadu_ps(gate + i);
        const __m256 power = exponential_of(_mm256_xor_ps(g, _mm256_set1_ps(-0.0f)));
        const __m256 silu = _mm256_div_ps(g, _mm256_add_ps(_mm256_set1_ps(1.0f), power));
        const __m256 product = _mm256_mul_ps(silu, _mm256_loadu_ps(up + i));
        _mm256_storeu_ps(y + i, product);
        found = _mm256_max_ps(magnitude(product), found);
    }
    return std::max(largest_of(found), scalar::swiglu(gate + i, up + i, count - i, y + i));
}

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

inline __m512 gelu_of(__m512 x) {
    const __m512 a = _mm512_min_ps(_mm512_set1_ps(kGeluEnd), _mm512_abs_ps(x));
    __m512 p = _mm512_set1_ps(kGelu[0]);
    for (int j = 1; j <= kGeluDegree; ++j) p = _mm512_fmadd_ps(p, a, _mm512_set1_ps(kGelu[j]));
    const __m512 square = _mm512_mul_ps(p, p), fourth = _mm512_mul_ps(square, square);
    const __m512 h = _mm512_div_ps(a, _mm512_mul_ps(fourth, fourth));
    return _mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), h);
}

}  // namespace

float largest(const float* x, int count) {
    __m512 found = _mm512_setzero_ps();
    for (int i = 0; i < count; i += kLanes)
        found = _mm512_max_ps(found, _mm512_abs_ps(_mm512_maskz_loadu_ps(first_lanes(count - i), x + i)));
    return _mm512_reduce_max_ps(found);
}

float rmsnorm(const float* x_D, const float* weight_D, float eps, int count, float* y_D) {
    __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
    for (int i = 0; i < count; i += kLanes) {
        const __m512 x = _mm512_maskz_loadu_ps(first_lanes(count - i), x_D + i);
        const __m512d x_low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
        const __m512d x_high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
        low = _mm512_add_pd(low, _mm512_mul_pd(x_low, x_low));
        high = _mm512_add_pd(high, _mm512_mul_pd(x_high, x_high));
    }
    double lanes[kLanes];
    _mm512_storeu_pd(lanes, low);
    _mm512_storeu_pd(lanes + 8, high);
    const __m512 inverse = _mm512_set1_ps(inverse_rms(lanes, count, eps));
    __m512 found = _mm512_setzero_ps();
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 x = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, x_D + i), inverse);
        const __m512 y = _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, weight_D + i), x);
        _mm512_mask_storeu_ps(y_D + i, mask, y);
        found = _mm512_max_ps(found, _mm512_abs_ps(y));
    }
    return _mm512_reduce_max_ps(found);
}

float layernorm(const float* x_D, const float* weight_D, const float* bias_D, float eps, int count,
                float* y_D) {
    double lanes[kLanes];
    // Sums term(x - from), in lanes.
    const auto sum = [&](double from, auto term) {
        const __m512d center = _mm512_set1_pd(from);
        __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
        for (int i = 0; i < count; i += kLanes) {
            const __mmask16 mask = first_lanes(count - i);
            const __m512 x = _mm512_maskz_loadu_ps(mask, x_D + i);
            const __m512d x_low = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
            const __m512d x_high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
            low = _mm512_add_pd(low, term(_mm512_maskz_sub_pd(__mmask8(mask), x_low, center)));
            high = _mm512_add_pd(high, term(_mm512_maskz_sub_pd(__mmask8(mask >> 8), x_high, center)));
        }
        _mm512_storeu_pd(lanes, low);
        _mm512_storeu_pd(lanes + 8, high);
    };
    sum(0, [](__m512d x) { return x; });
    const double mean = mean_of(lanes, count);
    sum(mean, [](__m512d x) { return _mm512_mul_pd(x, x); });
    const SplitMean split(mean);
    const __m512 inverse = _mm512_set1_ps(inverse_rms(lanes, count, eps));
    __m512 found = _mm512_setzero_ps();
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 high = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, x_D + i), _mm512_set1_ps(split.high));
        const __m512 x = _mm512_sub_ps(high, _mm512_set1_ps(split.low));
        const __m512 weight = _mm512_maskz_loadu_ps(mask, weight_D + i);
        const __m512 bias = _mm512_maskz_loadu_ps(mask, bias_D + i);
        const __m512 y = _mm512_fmadd_ps(weight, _mm512_mul_ps(x, inverse), bias);
        _mm512_mask_storeu_ps(y_D + i, mask, y);
        found = _mm512_max_ps(_mm512_abs_ps(y), found);
    }
    return _mm512_reduce_max_ps(found);
}

float quantize(const float* x_K, int count, float largest_x, std::uint8_t* q_K) {
    const float scale = quantization_scale(largest_x);
    const __m512 divisor = _mm512_set1_ps(scale);
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 x = _mm512_maskz_loadu_ps(mask, x_K + i);
        const __m128i steps = _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(_mm512_div_ps(x, divisor)));
        _mm_mask_storeu_epi8(q_K + i, mask, _mm_xor_si128(steps, _mm_set1_epi8(-128)));
    }
    return scale;
}

void split(const float* x_K, int count, std::uint16_t* high_K, std::uint16_t* low_K) {
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 x = _mm512_maskz_loadu_ps(mask, x_K + i);
        const __m512i high = nearest_bf16(x);
        const __m512i low = nearest_bf16(_mm512_sub_ps(x, _mm512_castsi512_ps(_mm512_slli_epi32(high, 16))));
        _mm256_mask_storeu_epi16(high_K + i, mask, _mm512_cvtepi32_epi16(high));
        _mm256_mask_storeu_epi16(low_K + i, mask, _mm512_cvtepi32_epi16(low));
    }
}

float gelu(const float* x, int count, float* y) {
    __m512 found = _mm512_setzero_ps();
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 result = gelu_of(_mm512_maskz_loadu_ps(mask, x + i));
        _mm512_mask_storeu_ps(y + i, mask, result);
        found = _mm512_max_ps(_mm512_abs_ps(result), found);
    }
    return _mm512_reduce_max_ps(found);
}

float geglu(const float* gate, const float* up, int count, float* y) {
    __m512 found = _mm512_setzero_ps();
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 gelu = gelu_of(_mm512_maskz_loadu_ps(mask, gate + i));
        const __m512 product = _mm512_mul_ps(gelu, _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(y + i, mask, product);
        found = _mm512_max_ps(_mm512_abs_ps(product), found);
    }
    return _mm512_reduce_max_ps(found);
}

float swiglu(const float* gate, const float* up, int count, float* y) {
    const __m512 one = _mm512_set1_ps(1.0f);
    __m512 found = _mm512_setzero_ps();
    for (int i = 0; i < count; i += kLanes) {
        const __mmask16 mask = first_lanes(count - i);
        const __m512 g = _mm512_maskz_loadu_ps(mask, gate + i);
        const __m512 negative = _mm512_xor_ps(g, _mm512_set1_ps(-0.0f));
        const __m512 silu = _mm512_div_ps(g, _mm512_add_ps(one, exponential_of(negative)));
        const __m512 product = _mm512_mul_ps(silu, _mm512_maskz_loadu_ps(mask, up + i));
        _mm512_mask_storeu_ps(y + i, mask, product);
        found = _mm512_max_ps(found, _mm512_abs_ps(product));
    }
    return _mm512_reduce_max_ps(found);
}

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
