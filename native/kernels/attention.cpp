// Attention of new tokens, for the query heads that share a key/value head, over the positions in the cache,
// with online softmax over chunks of 256 positions.
//
//   s[p] = sum_e (scale q[e]) k[p, e];   m = max s;   w[p] = exp(s[p] - m);   l = sum_p w[p]
//   o[e] = sum_p w[p] v[p, e];   chunk after chunk (m, l, o) are merged;   out[e] = o[e] / l
//
// A row is one query head of one token. Keys and values lie in vectors (kv_layout.hpp) that are loaded once
// for all rows of a task. Chunks are cut at multiples of 256 positions and merged in order, and sums run in
// order over e and p, so a row's result depends neither on the other rows nor on how work was split.
//
// f32, bf16: one fused chain a sum (a bf16 widens by a shift and by a mask; `vdpbf16ps` would take as long).
// i8: a row of queries becomes 16-bit integers with one step, max / 32639, and so do the chunk's w times the
// values' scales; both sums are exact int32. 16 bits are two bytes: two `vpdpbusd` a row and vector, which is
// as fast for 64 numbers as bf16 is for 32. The sum of weights runs in 16 lanes, which are halved four times.
// Every level gives the same bits. Bound by memory for few rows, else by 2 multiply-adds a row and vector.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/exponential.hpp"
#include "kernels/kernels.hpp"
#include "kernels/target.hpp"

namespace gossamer {
namespace {

constexpr int kLanes = kKvLanes;
constexpr std::size_t kAheadBytes = 12 << 10;  // prefetched: what comes next is read in this order too
constexpr float kLargest16 = 32639;            // 127 * 256 + 127: the largest that two signed bytes make

// A row's state: o [E padded to 16], then m and l.
int padded(int head_dim) { return int(round_up(std::size_t(head_dim), kLanes)); }

void merge(float* state, const float* next, int width) {
    const float largest = std::max(state[width], next[width]);
    const float a = scalar::exponential_of(state[width] - largest);
    const float b = scalar::exponential_of(next[width] - largest);
    for (int e = 0; e < width; ++e) state[e] = state[e] * a + next[e] * b;
    state[width] = largest;
    state[width + 1] = state[width + 1] * a + next[width + 1] * b;
}

void finish(const float* state, int head_dim, float* out_E) {
    const float sum = state[padded(head_dim) + 1];
    for (int e = 0; e < head_dim; ++e) out_E[e] = state[e] / sum;
}

// Positions of a chunk that a token sees; none or less: the token comes before the chunk.
int visible(const AttentionTask& task, int chunk, int token) {
    return std::min(kChunkPositions, task.position + token + 1 - chunk * kChunkPositions);
}

// What the wider levels keep for each row of a task.
struct Area {
    std::size_t state_stride;
    float *queries, *scores, *states;
    float* steps;           // i8: of the queries, then of the weights
    std::int32_t* offsets;  // likewise

    Area(float* scratch, int num_rows, int head_dim)
        : state_stride(attention_state_floats(head_dim)),
          queries(scratch),
          scores(queries + std::size_t(num_rows) * padded(head_dim)),
          states(scores + std::size_t(num_rows) * kChunkPositions),
          steps(states + 2 * std::size_t(num_rows) * state_stride),
          offsets(reinterpret_cast<std::int32_t*>(steps + 2 * num_rows)) {}
};

}  // namespace

std::size_t attention_state_floats(int head_dim) { return std::size_t(padded(head_dim)) + kLanes; }

std::size_t attention_scratch_floats(int num_rows, int head_dim) {
    const std::size_t states = 2 * attention_state_floats(head_dim);
    return std::size_t(num_rows) * (std::size_t(padded(head_dim)) + kChunkPositions + states + 4);
}

void merge_attention(const float* states, std::size_t stride, int num_chunks, int head_dim, float* out_E) {
    float* state = const_cast<float*>(states);
    for (int chunk = 1; chunk < num_chunks; ++chunk)
        merge(state, states + std::size_t(chunk) * stride, padded(head_dim));
    finish(state, head_dim, out_E);
}

namespace scalar {
namespace {

struct F32 {
    static constexpr int kInputs = 1;
    static float at(const std::uint8_t* vector, int index) {
        return reinterpret_cast<const float*>(vector)[index];
    }
};

struct Bf16 {
    static constexpr int kInputs = 2;
    static float at(const std::uint8_t* vector, int index) {
        return std::bit_cast<float>(std::uint32_t(reinterpret_cast<const std::uint16_t*>(vector)[index])
                                    << 16);
    }
};

struct I8 {
    static constexpr int kInputs = 4;
    static std::int32_t at(const std::uint8_t* vector, int index) { return vector[index] - 128; }
};

// The number in column `row` of a block, at input `input`.
template <class T>
auto number(const std::uint8_t* vectors, std::size_t step_bytes, int row, int input) {
    return T::at(vectors + std::size_t(input / T::kInputs) * step_bytes,
                 row * T::kInputs + input % T::kInputs);
}

// sum_i a[i] b[row, i]; i8: a becomes 16-bit integers first.
template <class T>
float product(const float* a, int count, const std::uint8_t* vectors, std::size_t step_bytes, int row) {
    if constexpr (T::kInputs < 4) {
        float sum = 0;
        for (int i = 0; i < count; ++i) sum = std::fma(a[i], number<T>(vectors, step_bytes, row, i), sum);
        return sum;
    } else {
        float largest = 0;
        for (int i = 0; i < count; ++i) largest = std::max(largest, std::abs(a[i]));
        const float inverse = largest > 0 ? kLargest16 / largest : 0;
        std::int32_t sum = 0;
        for (int i = 0; i < count; ++i)
            sum += std::int32_t(std::lrintf(a[i] * inverse)) * number<T>(vectors, step_bytes, row, i);
        return float(sum) * (largest / kLargest16);
    }
}

// The state of one row after one chunk.
template <class T>
void attend(const KvLayout& layout, const std::uint8_t* chunk, const float* q_E, int count, float* state) {
    const int E = layout.head_dim, width = padded(E);
    const float* scales = reinterpret_cast<const float*>(chunk);
    float weights[kChunkPositions], lanes[kLanes] = {};
    for (int p = 0; p < count; ++p) {
        const std::uint8_t* keys = chunk + layout.key_block(p / kKvBlock);
        weights[p] = product<T>(q_E, E, keys, layout.key_step_bytes(), p % kKvBlock);
        if (T::kInputs == 4) weights[p] *= scales[p];
    }
    const float largest = *std::max_element(weights, weights + count);
    for (int p = 0; p < count; ++p) {
        weights[p] = exponential_of(weights[p] - largest);
        lanes[p % kLanes] += weights[p];
        if (T::kInputs == 4) weights[p] *= scales[kChunkPositions + p];
    }
    for (int half = kLanes / 2; half > 0; half /= 2) {
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
    }
    for (int e = 0; e < E; ++e) {
        const std::uint8_t* values = chunk + layout.value_block(e / kKvBlock);
        state[e] = product<T>(weights, count, values, layout.value_step_bytes(e / kKvBlock), e % kKvBlock);
    }
    state[width] = largest;
    state[width + 1] = lanes[0];
}

template <class T>
void attention(const AttentionTask& task) {
    const int E = task.layout.head_dim;
    float *q_E = task.scratch, *state = q_E + E, *next = state + attention_state_floats(E);
    for (int row = 0; row < task.num_tokens * task.num_heads; ++row) {
        const int token = row / task.num_heads, head = row % task.num_heads;
        const std::size_t begin = token * task.stride + std::size_t(head) * E;
        for (int e = 0; e < E; ++e) q_E[e] = task.q[begin + e] * task.scale;
        if (task.state) state = task.state + row * attention_state_floats(E);
        for (int c = task.begin; c < task.end && visible(task, c, token) > 0; ++c) {
            const std::uint8_t* chunk = task.chunks[c] + task.head_begin;
            attend<T>(task.layout, chunk, q_E, visible(task, c, token), c == task.begin ? state : next);
            if (c != task.begin) merge(state, next, padded(E));
        }
        if (!task.state) finish(state, E, task.out + begin);
    }
}

}  // namespace

void attention_f32(const AttentionTask& task) { attention<F32>(task); }
void attention_bf16(const AttentionTask& task) { attention<Bf16>(task); }
void attention_i8(const AttentionTask& task) { attention<I8>(task); }

}  // namespace scalar

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

// The first `count` lanes of x, then `other`.
inline Floats keep(Floats x, int count, float other) {
    if (count >= kLanes) return x;
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256 low = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count), lanes));
    const __m256 high = _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(count - 8), lanes));
    const __m256 others = _mm256_set1_ps(other);
    return {_mm256_blendv_ps(others, x.low, low), _mm256_blendv_ps(others, x.high, high)};
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

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

using Floats = __m512;

inline Floats load(const float* x) { return _mm512_loadu_ps(x); }
inline void store(float* x, Floats y) { _mm512_storeu_ps(x, y); }
inline Floats fill(float x) { return _mm512_set1_ps(x); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats subtract(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats larger(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline float largest_of(Floats x) { return _mm512_reduce_max_ps(x); }

// The first `count` lanes of x, then `other`.
inline Floats keep(Floats x, int count, float other) {
    if (count >= kLanes) return x;
    return _mm512_mask_mov_ps(fill(other), __mmask16((1u << count) - 1), x);
}

struct F32 {
    static constexpr int kInputs = 1, kStepBytes = 4, kMaxRows = 4;
    static constexpr int vectors(int) { return 4; }
    static constexpr int kSums = 1;
    using Sum = __m512;
    using Vector = __m512;
    using Left = __m512;

    static Vector vector(const std::uint8_t* b) { return _mm512_loadu_ps(b); }
    static Left left(const std::uint8_t* a) { return _mm512_set1_ps(*reinterpret_cast<const float*>(a)); }
    static void add(Sum* sum, Vector b, Left a) { *sum = _mm512_fmadd_ps(a, b, *sum); }
    static Floats total(const Sum* sum, std::int32_t, float) { return *sum; }
};

struct Bf16 {
    static constexpr int kInputs = 2, kStepBytes = 8, kMaxRows = 4;
    static constexpr int vectors(int) { return 4; }
    static constexpr int kSums = 1;
    using Sum = __m512;
    struct Vector {
        __m512 even, odd;
    };
    using Left = Vector;

    static Vector vector(const std::uint8_t* b) {
        const __m512i both = _mm512_loadu_si512(b), high = _mm512_set1_epi32(std::int32_t(0xFFFF0000));
        return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
                _mm512_castsi512_ps(_mm512_and_si512(both, high))};
    }
    static Left left(const std::uint8_t* a) {
        const float* x = reinterpret_cast<const float*>(a);
        return {_mm512_set1_ps(x[0]), _mm512_set1_ps(x[1])};
    }
    static void add(Sum* sum, const Vector& b, const Left& a) {
        *sum = _mm512_fmadd_ps(a.odd, b.odd, _mm512_fmadd_ps(a.even, b.even, *sum));
    }
    static Floats total(const Sum* sum, std::int32_t, float) { return *sum; }
};

// Left numbers lie as [4 high bytes][4 low bytes]; 128 times their sum undoes the 128 in the right ones.
struct I8 {
    static constexpr int kInputs = 4, kStepBytes = 8, kMaxRows = 2;
    static constexpr int vectors(int) { return 4; }
    static constexpr int kSums = 2;  // of products with the high and with the low bytes
    using Sum = __m512i;
    using Vector = __m512i;
    struct Left {
        __m512i high, low;
    };

    static Vector vector(const std::uint8_t* b) { return _mm512_loadu_si512(b); }
    static Left left(const std::uint8_t* a) {
        const std::int32_t* x = reinterpret_cast<const std::int32_t*>(a);
        return {_mm512_set1_epi32(x[0]), _mm512_set1_epi32(x[1])};
    }
    static void add(Sum* sums, Vector b, const Left& a) {
        accumulate(sums[0], b, a.high);
        accumulate(sums[1], b, a.low);
    }
    // GCC 12 copies the sums of _mm512_dpbusd_epi32 back and forth in a loop.
    static void accumulate(__m512i& sum, __m512i b, __m512i a) {
        __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(b), "v"(a));
    }
    static Floats total(const Sum* sums, std::int32_t offset, float step) {
        const __m512i both = _mm512_add_epi32(_mm512_slli_epi32(sums[0], 8), sums[1]);
        return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(both, _mm512_set1_epi32(offset))),
                             _mm512_set1_ps(step));
    }
    // Makes `count` floats integers times `inverse`, in place; returns the offset.
    static std::int32_t pack(float* x, int count, float inverse) {
        // Of q + 128, byte 1 is the high byte; byte 0 is the low one + 128.
        const __m256i order = _mm256_setr_epi8(1, 5, 9, 13, 0, 4, 8, 12, 17, 21, 25, 29, 16, 20, 24, 28, 33,
                                               37, 41, 45, 32, 36, 40, 44, 49, 53, 57, 61, 48, 52, 56, 60);
        const __m256i flip = _mm256_set1_epi64x(std::int64_t(0x8080808000000000));
        std::uint8_t* out = reinterpret_cast<std::uint8_t*>(x);
        __m512i sum = _mm512_setzero_si512();
        for (int i = 0; i < count; i += kLanes, out += 2 * kLanes) {
            const __m512i q =
                _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(inverse)));
            const __m512i bytes = _mm512_permutexvar_epi8(_mm512_castsi256_si512(order),
                                                          _mm512_add_epi32(q, _mm512_set1_epi32(128)));
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out),
                                _mm256_xor_si256(_mm512_castsi512_si256(bytes), flip));
            sum = _mm512_add_epi32(sum, q);
        }
        return 128 * _mm512_reduce_add_epi32(sum);
    }
};

inline float sum_of(Floats x) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

inline Floats magnitude(Floats x) { return _mm512_abs_ps(x); }

#include "kernels/attention_rows.hpp"

}  // namespace

void attention_f32(const AttentionTask& task) { attention<F32>(task); }
void attention_bf16(const AttentionTask& task) { attention<Bf16>(task); }
void attention_i8(const AttentionTask& task) { attention<I8>(task); }

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
