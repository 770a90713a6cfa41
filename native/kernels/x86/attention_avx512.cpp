// Attention by AVX-512 and, for many rows over bf16 keys and values, by tiles: see ../scalar/attention.cpp.
//
// Keys and values lie in vectors (../kv_layout.hpp) that are loaded once for all rows of a task. The bound is
// memory for few rows, else 2 multiply-adds for each row and vector.
//
//   bf16  A number widens by a shift or a mask; `vdpbf16ps` would take as long.
//   i8    A 16-bit integer of a row is two bytes, so that a row and vector take two `vpdpbusd`. That is as
//         fast for 64 numbers as bf16 is for 32.
//   amx   For bf16 and 16 rows or more, rows are split into two bfloat16, whose products with tiles have an
//         error of 2^-16 of their size.

#include <bit>

#include "kernels/attention_task.hpp"
#include "kernels/x86/exponential.hpp"
#include "kernels/x86/target.hpp"
#include "kernels/x86/tiles.hpp"

namespace gossamer {

using namespace attention;

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

// The lanes [begin, end) of x, and `other` elsewhere.
inline Floats keep(Floats x, int begin, int end, float other) {
    if (begin <= 0 && end >= kLanes) return x;
    const auto below = [](int count) { return (1u << std::clamp(count, 0, kLanes)) - 1; };
    return _mm512_mask_mov_ps(fill(other), __mmask16(below(end) & ~below(begin)), x);
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

GOSSAMER_BEGIN_AMX
namespace amx {
namespace {

// bf16 keys and values against rows of numbers that are split into two bfloat16 each (see
// ../scalar/floats.cpp): 32 floats become [32 high][32 low].
template <class Tiles>
struct Bf16 {
    static constexpr int kInputs = 2, kTileInputs = 32;

    // In place; numbers past `count` up to a multiple of 32 become zero.
    static void pack(float* x, int count) {
        for (int i = count; i < int(round_up(count, kTileInputs)); ++i) x[i] = 0;
        for (int i = 0; i < count; i += kTileInputs) {
            alignas(64) std::uint16_t parts[2][kTileInputs];
            avx512::split(x + i, kTileInputs, parts[0], parts[1]);
            std::memcpy(x + i, parts, sizeof parts);
        }
    }

    // y [rows][16 num_vectors] = a b, 16 rows and 16 steps of 2 inputs at a time.
    static void products(const avx512::Rows& a, int rows, const avx512::Block& b, float* y,
                         std::size_t stride) {
        Tiles tiles;
        for (int row = 0; row < rows; row += kTileRows) {
            const int height = std::min(kTileRows, rows - row);
            for (int step = 0; step < b.num_steps; step += kTileRows) {
                const int depth = std::min(kTileRows, b.num_steps - step);
                const std::uint8_t* left = a.data + row * a.row_bytes + std::size_t(step) * 2 * sizeof(float);
                tiles.begin(height, depth);
                tiles.template load<4>(left, a.row_bytes);
                tiles.template load<5>(left + kTileBytes, a.row_bytes);
                for (int v = 0; v < b.num_vectors; ++v) {
                    float* sums = y + row * stride + v * kLanes;
                    if (step == 0) {
                        tiles.template zero<0>();
                    } else {
                        tiles.template load<0>(sums, stride * sizeof(float));
                    }
                    tiles.template load<6>(b.data + step * b.step_bytes + v * kVectorBytes, b.step_bytes);
                    tiles.template multiply_bf16<0, 4, 6>();
                    tiles.template multiply_bf16<0, 5, 6>();
                    tiles.template store<0>(sums, stride * sizeof(float));
                }
            }
        }
        tiles.end();
    }
};

// Fewer rows than a tile has, and widths that do not fill one, are left to vectors.
template <class Tiles>
void attention(const AttentionTask& task) {
    const bool fits = task.layout.head_dim % Bf16<Tiles>::kTileInputs == 0;
    if (fits && task.num_tokens * task.num_heads >= kTileRows) return avx512::attention<Bf16<Tiles>>(task);
    avx512::attention_bf16(task);
}

}  // namespace

void attention_bf16(const AttentionTask& task) { attention<Hardware>(task); }

}  // namespace amx

namespace amx_emulated {

void attention_bf16(const AttentionTask& task) { amx::attention<amx::Emulated>(task); }

}  // namespace amx_emulated
GOSSAMER_END

}  // namespace gossamer
