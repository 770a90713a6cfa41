// Attention by AVX2: see ../scalar/attention.cpp.
//
// Keys and values lie in vectors (../kv_layout.hpp) that are loaded once for all rows of a task. A bf16
// widens by a shift or a mask.

#include <bit>

#include "kernels/attention_task.hpp"
#include "kernels/x86/exponential.hpp"
#include "kernels/x86/target.hpp"

namespace gossamer {

using namespace attention;

GOSSAMER_BEGIN_AVX2
namespace avx2 {
namespace {

struct Floats {
    __m256 low, high;
};

inline Floats load(const float* x) { return {_mm256_loadu_ps(x), _mm256_loadu_ps(x + 8)}; }
inline void store(float* x, Floats y) {
    _mm256_storeu_ps(x, y.low);
    _mm256_storeu_ps(x + 8, y.high);
}
inline Floats fill(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats subtract(Floats a, Floats b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}
inline Floats multiply(Floats a, Floats b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Floats larger(Floats a, Floats b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}
inline Floats magnitude(Floats x) {
    const __m256 sign = _mm256_set1_ps(-0.0f);
    return {_mm256_andnot_ps(sign, x.low), _mm256_andnot_ps(sign, x.high)};
}
inline Floats exponential_of(Floats x) { return {avx2::exponential_of(x.low), avx2::exponential_of(x.high)}; }
inline float largest_of(Floats x) {
    const __m256 eight = _mm256_max_ps(x.low, x.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}
inline float sum_of(Floats x) {
    const __m256 eight = _mm256_add_ps(x.low, x.high);
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// The lanes [begin, end) of x, and `other` elsewhere.
inline __m256 keep(__m256 x, int begin, int end, float other) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i before = _mm256_cmpgt_epi32(_mm256_set1_epi32(begin), lanes);
    const __m256i kept = _mm256_andnot_si256(before, _mm256_cmpgt_epi32(_mm256_set1_epi32(end), lanes));
    return _mm256_blendv_ps(_mm256_set1_ps(other), x, _mm256_castsi256_ps(kept));
}
inline Floats keep(Floats x, int begin, int end, float other) {
    if (begin <= 0 && end >= kLanes) return x;
    return {keep(x.low, begin, end, other), keep(x.high, begin - 8, end - 8, other)};
}

struct F32 {
    static constexpr int kInputs = 1, kStepBytes = 4, kMaxRows = 4, kSums = 1;
    static constexpr int vectors(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }
    using Sum = Floats;
    using Vector = Floats;
    using Left = __m256;

    static Vector vector(const std::uint8_t* b) { return load(reinterpret_cast<const float*>(b)); }
    static Left left(const std::uint8_t* a) { return _mm256_set1_ps(*reinterpret_cast<const float*>(a)); }
    static void add(Sum* sum, const Vector& b, Left a) {
        sum->low = _mm256_fmadd_ps(a, b.low, sum->low);
        sum->high = _mm256_fmadd_ps(a, b.high, sum->high);
    }
    static Floats total(const Sum* sum, std::int32_t, float) { return *sum; }
};

struct Bf16 {
    static constexpr int kInputs = 2, kStepBytes = 8, kMaxRows = 4, kSums = 1;
    static constexpr int vectors(int rows) { return rows == 1 ? 2 : 1; }
    using Sum = Floats;
    struct Vector {
        Floats even, odd;
    };
    struct Left {
        __m256 even, odd;
    };

    static __m256 even(__m256i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(x, 16)); }
    static __m256 odd(__m256i x) {
        return _mm256_castsi256_ps(_mm256_and_si256(x, _mm256_set1_epi32(std::int32_t(0xFFFF0000))));
    }
    static Vector vector(const std::uint8_t* b) {
        const __m256i* pairs = reinterpret_cast<const __m256i*>(b);
        const __m256i low = _mm256_loadu_si256(pairs), high = _mm256_loadu_si256(pairs + 1);
        return {{even(low), even(high)}, {odd(low), odd(high)}};
    }
    static Left left(const std::uint8_t* a) {
        const float* x = reinterpret_cast<const float*>(a);
        return {_mm256_set1_ps(x[0]), _mm256_set1_ps(x[1])};
    }
    static void add(Sum* sum, const Vector& b, const Left& a) {
        F32::add(sum, b.even, a.even);
        F32::add(sum, b.odd, a.odd);
    }
    static Floats total(const Sum* sum, std::int32_t, float) { return *sum; }
};

// `vpmaddubsw` saturates, so the right bytes widen to 16 bits: (0, 2) and (1, 3) of every four. Left numbers
// lie in that order.
struct I8 {
    static constexpr int kInputs = 4, kStepBytes = 8, kMaxRows = 4, kSums = 1;
    static constexpr int vectors(int rows) { return rows == 1 ? 2 : 1; }
    struct Sum {
        __m256i low, high;
    };
    struct Vector {
        __m256i low_even, low_odd, high_even, high_odd;
    };
    struct Left {
        __m256i even, odd;
    };

    static __m256i even(__m256i x) { return _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8); }
    static __m256i odd(__m256i x) { return _mm256_srai_epi16(x, 8); }
    static Vector vector(const std::uint8_t* b) {
        const __m256i* bytes = reinterpret_cast<const __m256i*>(b);
        const __m256i flip = _mm256_set1_epi8(-128);
        const __m256i low = _mm256_xor_si256(_mm256_loadu_si256(bytes), flip);
        const __m256i high = _mm256_xor_si256(_mm256_loadu_si256(bytes + 1), flip);
        return {even(low), odd(low), even(high), odd(high)};
    }
    static Left left(const std::uint8_t* a) {
        const std::int32_t* x = reinterpret_cast<const std::int32_t*>(a);
        return {_mm256_set1_epi32(x[0]), _mm256_set1_epi32(x[1])};
    }
    static __m256i accumulate(__m256i sum, __m256i b, __m256i a) {
        return _mm256_add_epi32(sum, _mm256_madd_epi16(b, a));
    }
    static void add(Sum* sum, const Vector& b, const Left& a) {
        sum->low = accumulate(accumulate(sum->low, b.low_even, a.even), b.low_odd, a.odd);
        sum->high = accumulate(accumulate(sum->high, b.high_even, a.even), b.high_odd, a.odd);
    }
    static Floats total(const Sum* sum, std::int32_t, float step) {
        return multiply({_mm256_cvtepi32_ps(sum->low), _mm256_cvtepi32_ps(sum->high)}, fill(step));
    }
    // Makes `count` floats integers times `inverse`, in place; there is no offset.
    static std::int32_t pack(float* x, int count, float inverse) {
        std::uint8_t* out = reinterpret_cast<std::uint8_t*>(x);
        for (int i = 0; i < count; i += kLanes, out += 2 * kLanes) {
            const Floats scaled = multiply(load(x + i), fill(inverse));
            const __m256i mixed =
                _mm256_packs_epi32(_mm256_cvtps_epi32(scaled.low), _mm256_cvtps_epi32(scaled.high));
            const __m256i q = _mm256_permute4x64_epi64(mixed, _MM_SHUFFLE(3, 1, 2, 0));
            const __m256i half = _mm256_shufflelo_epi16(q, _MM_SHUFFLE(3, 1, 2, 0));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                                _mm256_shufflehi_epi16(half, _MM_SHUFFLE(3, 1, 2, 0)));
        }
        return 0;
    }
};

#include "kernels/attention_rows.hpp"

}  // namespace

void attention_f32(const AttentionTask& task) { attention<F32>(task); }
void attention_bf16(const AttentionTask& task) { attention<Bf16>(task); }
void attention_i8(const AttentionTask& task) { attention<I8>(task); }

}  // namespace avx2
GOSSAMER_END

}  // namespace gossamer
