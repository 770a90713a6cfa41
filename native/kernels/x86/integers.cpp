// Products of int8 or int4 weights and int8 activations, by vectors and by tiles: see ../scalar/integers.cpp.
//
// `avx512`: `vpdpbusd` adds 4 products to each of 16 rows. Up to 16 tokens (4 beside a matrix unit) take
// vectors straight from the stream: 3.3 cycles a vector on Zen 4, 3.0 on Emerald Rapids, and at 70% zeros a
// vector is 27 bytes, so one core could read 30 GB/s at 3.7 GHz; software prefetch, 0.5 to 4 KiB ahead, made
// it 5 to 20% slower. Their activations are one stream, interleaved: with one for each token the weights came
// from memory at half the speed. int4 sums 16 q4 u over 128 inputs, then multiplies. For more tokens, 512
// inputs of two panels are expanded once and serve blocks of 12: 24 products for 14 loads.
//
// `avx2`: `vpmaddubsw` would saturate, so weights and activations are widened to 16 bits for `vpmaddwd`.
//
// `amx`: see tiles.hpp; the expanded chunk is tiles of 16 vectors.

#include <algorithm>
#include <cstring>

#include "kernels/kernels.hpp"
#include "kernels/x86/expand_avx2.hpp"
#include "kernels/x86/expand_avx512.hpp"
#include "kernels/x86/row_sums_avx512.hpp"
#include "kernels/x86/target.hpp"
#include "kernels/x86/tiles.hpp"

namespace gossamer {

GOSSAMER_BEGIN_AVX2
namespace avx2 {
namespace {

constexpr int kTokens = 2;

// Adds a chunk's products to sums [T][4] of 8 int32: 4 rows, two partial sums each.
template <int T>
void add_chunk(const std::uint8_t* weights, int count, const std::uint8_t* q, std::size_t stride,
               __m256i* sums) {
    __m256i acc[T][4];
    for (int i = 0; i < 4 * T; ++i) acc[i / 4][i % 4] = sums[i];
    for (int v = 0; v < count; ++v, weights += kVectorBytes, q += 4) {
        __m256i inputs[T];
        for (int t = 0; t < T; ++t)
            inputs[t] = _mm256_cvtepu8_epi16(_mm_set1_epi32(load_as<std::int32_t>(q + t * stride)));
        for (int part = 0; part < 4; ++part) {
            const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weights + 16 * part));
            const __m256i words = _mm256_cvtepi8_epi16(bytes);
            for (int t = 0; t < T; ++t)
                acc[t][part] = _mm256_add_epi32(acc[t][part], _mm256_madd_epi16(words, inputs[t]));
        }
    }
    for (int i = 0; i < 4 * T; ++i) sums[i] = acc[i / 4][i % 4];
}

// sums [token][2] of 8 rows each.
void fold(const __m256i* partial, __m256i* sums) {
    for (int half = 0; half < 2; ++half) {
        const __m256i pairs = _mm256_hadd_epi32(partial[2 * half], partial[2 * half + 1]);
        sums[half] = _mm256_permute4x64_epi64(pairs, 0b11011000);
    }
}

template <Values kValues, Storage kStorage, class Sink>
void product(const Linear& w, int begin, int end, const Activations& x, Sink sink) {
    alignas(32) std::uint8_t expanded[lies_expanded(kValues, kStorage) ? 1 : kChunkVectors * kVectorBytes];
    __m256i sums[kSuperBlock][4];
    for (int panel = begin; panel < end; ++panel) {
        for (int origin = 0; origin < x.num_tokens; origin += kSuperBlock) {
            const int tokens = std::min(kSuperBlock, x.num_tokens - origin);
            for (int i = 0; i < 4 * tokens; ++i) sums[i / 4][i % 4] = _mm256_setzero_si256();
            const std::uint8_t* position = w.panel(panel);
            for (int v = 0; v < w.num_vectors(); v += kChunkVectors) {
                const int count = std::min(kChunkVectors, w.num_vectors() - v);
                const std::uint8_t* weights = expanded;
                if constexpr (lies_expanded(kValues, kStorage)) {
                    weights = position + std::size_t(v) * kVectorBytes;
                } else {
                    const std::uint8_t* rows = w.panel_multipliers(panel, v);
                    position = expand<kValues, kStorage>(position, rows, count, expanded);
                }
                const std::uint8_t* q = x.q + origin * x.stride + std::size_t(4) * v;
                int t = 0;
                for (; t + kTokens <= tokens; t += kTokens)
                    add_chunk<kTokens>(weights, count, q + t * x.stride, x.stride, sums[t]);
                for (; t < tokens; ++t) add_chunk<1>(weights, count, q + t * x.stride, x.stride, sums[t]);
            }
            for (int t = 0; t < tokens; ++t) {
                fold(sums[t], sums[t]);
                for (int half = 0; half < 2; ++half) {
                    const auto* row_sums =
                        reinterpret_cast<const __m256i*>(w.sum + panel * kPanelRows + 8 * half);
                    const __m256i offset = _mm256_slli_epi32(_mm256_loadu_si256(row_sums), 7);
                    sink(panel * kPanelRows + 8 * half, origin + t, _mm256_sub_epi32(sums[t][half], offset));
                }
            }
        }
    }
}

template <Values kValues, Storage kStorage>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    product<kValues, kStorage>(w, begin, end, x, [&](int row, int token, __m256i sums) {
        const __m256 scales = _mm256_mul_ps(_mm256_set1_ps(x.scale[token]), _mm256_loadu_ps(w.scale + row));
        _mm256_storeu_ps(y_TN + token * stride + row, _mm256_mul_ps(_mm256_cvtepi32_ps(sums), scales));
    });
}

template <Values kValues, Storage kStorage>
void accumulate(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                std::size_t stride) {
    product<kValues, kStorage>(w, begin, end, x, [&](int row, int token, __m256i sums) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(acc_TN + token * stride + row), sums);
    });
}

}  // namespace

GOSSAMER_MATMUL(i8, dense)
GOSSAMER_MATMUL(i8, sparse)
GOSSAMER_MATMUL(i8, blocks)
GOSSAMER_MATMUL(i4, dense)
GOSSAMER_MATMUL(i4, sparse)
GOSSAMER_ACCUMULATE(i8, dense)
GOSSAMER_ACCUMULATE(i8, sparse)
GOSSAMER_ACCUMULATE(i8, blocks)
GOSSAMER_ACCUMULATE(i4, dense)
GOSSAMER_ACCUMULATE(i4, sparse)

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

constexpr int kTokens = 12;

inline __m512i broadcast4(const std::uint8_t* q) { return _mm512_set1_epi32(load_as<std::int32_t>(q)); }

// One panel for T tokens, straight from the file. Few tokens need two chains to hide the latency of vpdpbusd.
template <Values kValues, Storage kStorage, int T>
void few(const Linear& w, int panel, const Activations& x, __m512i* totals) {
    Reader<kValues, kStorage> reader{w.panel(panel)};
    const std::uint8_t* q = x.q_block;
    constexpr int kRun = kValues == Values::i4 ? kScaleVectors : 1 << 20, kChains = T <= 8 ? 2 : 1;
    for (int first = 0; first < w.num_vectors(); first += kRun) {
        __m512i sums[kChains][T];
        unrolled<kChains * T>([&](auto i) { sums[i / T][i % T] = _mm512_setzero_si512(); });
        reader.template read<T <= 8>(
            std::min(kRun, w.num_vectors() - first),
            [&](__m512i a, __m512i b) __attribute__((always_inline)) {
                unrolled<T>(
                    [&](auto t) { sums[0][t] = _mm512_dpbusd_epi32(sums[0][t], broadcast4(q + 4 * t), a); });
                unrolled<T>([&](auto t) {
                    __m512i& sum = sums[kChains - 1][t];
                    sum = _mm512_dpbusd_epi32(sum, broadcast4(q + 4 * T + 4 * t), b);
                });
                q += 8 * T;
            },
            [&](__m512i a) __attribute__((always_inline)) {
                unrolled<T>(
                    [&](auto t) { sums[0][t] = _mm512_dpbusd_epi32(sums[0][t], broadcast4(q + 4 * t), a); });
            });
        unrolled<T>([&](auto t) {
            __m512i sum = sums[0][t];
            if constexpr (kChains == 2) sum = _mm512_add_epi32(sum, sums[1][t]);
            if constexpr (kValues == Values::i4) {  // 16 times too large so far
                const auto* rows = reinterpret_cast<const __m128i*>(w.panel_multipliers(panel, first));
                sum = _mm512_mullo_epi32(_mm512_srai_epi32(sum, 4),
                                         _mm512_cvtepu8_epi32(_mm_loadu_si128(rows)));
                if (first != 0) sum = _mm512_add_epi32(sum, totals[t]);
            }
            totals[t] = sum;
        });
    }
}

// Adds the products of `count` expanded vectors of R panels and T tokens to sums [R][kSuperBlock].
template <int R, int T>
void add_chunk(const std::uint8_t* const* weights, int count, const std::uint8_t* q, std::size_t stride,
               __m512i (*sums)[kSuperBlock], int token) {
    __m512i acc[R][T];
    const std::uint8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = weights[r];
    unrolled<R * T>([&](auto i) { acc[i / T][i % T] = sums[i / T][token + i % T]; });
    RowPointers<std::uint8_t, T> inputs(q, stride);
    for (int v = 0; v < count; ++v, inputs.advance(4)) {
        __m512i vector[R];
        for (int r = 0; r < R; ++r) vector[r] = _mm512_loadu_si512(rows[r] + std::size_t(v) * kVectorBytes);
        unrolled<T>([&](auto t) {
            const __m512i four = broadcast4(inputs.row(t));
            for (int r = 0; r < R; ++r) acc[r][t] = _mm512_dpbusd_epi32(acc[r][t], four, vector[r]);
        });
    }
    unrolled<R * T>([&](auto i) { sums[i / T][token + i % T] = acc[i / T][i % T]; });
}

// As many tokens as are left, T at a time.
template <int R, int T>
void add_tokens(const std::uint8_t* const* weights, int count, const std::uint8_t* q, std::size_t stride,
                __m512i (*sums)[kSuperBlock], int token, int tokens) {
    for (; token + T <= tokens; token += T)
        add_chunk<R, T>(weights, count, q + token * stride, stride, sums, token);
    if constexpr (T > 1) {
        if (token < tokens) add_tokens<R, (T + 1) / 2>(weights, count, q, stride, sums, token, tokens);
    }
}

// How expanded vectors meet many tokens: here by vpdpbusd.
struct VectorUnit {
    static constexpr int kFewTokens = 16;           // up to which vectors come straight from the file
    static constexpr int kVectors = kChunkVectors;  // of a panel, expanded at a time
    static constexpr int kMultiple = 1;             // their number is filled up to a multiple of this

    template <int R>
    void add(const std::uint8_t* const* weights, int count, const std::uint8_t* q, std::size_t stride,
             __m512i (*sums)[kSuperBlock], int tokens) const {
        add_tokens<R, kTokens>(weights, count, q, stride, sums, 0, tokens);
    }
};

// R panels and up to kSuperBlock tokens from `origin` on.
template <Values kValues, Storage kStorage, int R, class Unit, class Sink>
void many(const Linear& w, int panel, const Activations& x, int origin, Unit& unit, Sink sink) {
    alignas(64) std::uint8_t expanded[R][Unit::kVectors * kVectorBytes];
    alignas(64) __m512i sums[R][kSuperBlock];
    const int tokens = std::min(kSuperBlock, x.num_tokens - origin);
    const std::uint8_t *position[R], *weights[R];
    for (int r = 0; r < R; ++r) {
        position[r] = w.panel(panel + r);
        for (int t = 0; t < int(round_up(tokens, 16)); ++t) sums[r][t] = _mm512_setzero_si512();
    }
    for (int v = 0; v < w.num_vectors(); v += Unit::kVectors) {
        const int count = std::min(Unit::kVectors, w.num_vectors() - v);
        const int filled = int(round_up(count, Unit::kMultiple));
        for (int r = 0; r < R; ++r) {
            weights[r] =
                expanded_run<kValues, kStorage>(w, panel + r, v, count, filled, position[r], expanded[r]);
        }
        const std::uint8_t* q = x.q + origin * x.stride + std::size_t(4) * v;
        unit.template add<R>(weights, filled, q, x.stride, sums, tokens);
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < tokens; ++t) sink(panel + r, origin + t, sums[r][t]);
    }
}

template <Values kValues, Storage kStorage, int T, class Sink>
void all_few(const Linear& w, int begin, int end, const Activations& x, Sink sink) {
    for (int panel = begin; panel < end; ++panel) {
        __m512i totals[T];
        few<kValues, kStorage, T>(w, panel, x, totals);
        for (int t = 0; t < T; ++t) sink(panel, t, totals[t]);
    }
}

template <Values kValues, Storage kStorage, class Unit, class Sink>
void product(const Linear& w, int begin, int end, const Activations& x, Unit& unit, Sink sink) {
    bool done = false;
    unrolled<Unit::kFewTokens>([&](auto i) {
        if (x.num_tokens == i + 1) all_few<kValues, kStorage, i + 1>(w, begin, end, x, sink), done = true;
    });
    if (done) return;
    for (int origin = 0; origin < x.num_tokens; origin += kSuperBlock) {
        int panel = begin;
        for (; panel + 2 <= end; panel += 2) many<kValues, kStorage, 2>(w, panel, x, origin, unit, sink);
        if (panel < end) many<kValues, kStorage, 1>(w, panel, x, origin, unit, sink);
    }
}

template <Values kValues, Storage kStorage, class Unit>
void matmul_on(Unit&& unit, const Linear& w, int begin, int end, const Activations& x, float* y_TN,
               std::size_t stride) {
    product<kValues, kStorage>(w, begin, end, x, unit, OutputSink{w, x, y_TN, stride});
}

template <Values kValues, Storage kStorage, class Unit>
void accumulate_on(Unit&& unit, const Linear& w, int begin, int end, const Activations& x,
                   std::int32_t* acc_TN, std::size_t stride) {
    product<kValues, kStorage>(w, begin, end, x, unit, SumSink{w, acc_TN, stride});
}

template <Values kValues, Storage kStorage>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    matmul_on<kValues, kStorage>(VectorUnit(), w, begin, end, x, y_TN, stride);
}

template <Values kValues, Storage kStorage>
void accumulate(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                std::size_t stride) {
    accumulate_on<kValues, kStorage>(VectorUnit(), w, begin, end, x, acc_TN, stride);
}

}  // namespace

GOSSAMER_MATMUL(i8, dense)
GOSSAMER_MATMUL(i8, sparse)
GOSSAMER_MATMUL(i4, dense)
GOSSAMER_MATMUL(i4, sparse)
GOSSAMER_ACCUMULATE(i8, dense)
GOSSAMER_ACCUMULATE(i8, sparse)
GOSSAMER_ACCUMULATE(i4, dense)
GOSSAMER_ACCUMULATE(i4, sparse)

}  // namespace avx512
GOSSAMER_END

GOSSAMER_BEGIN_AMX
namespace amx {
namespace {

// M x 16 tokens and R panels: M x R tiles of sums that stay in the unit for a whole chunk.
template <class Tiles, int R, int M>
void multiply_block(Tiles& tiles, const std::uint8_t* const* weights, int count, const std::uint8_t* q,
                    std::size_t stride, __m512i (*sums)[kSuperBlock], int token) {
    constexpr std::size_t kTile = kTileRows * kTileBytes;
    tiles.template load<0>(&sums[0][token], kTileBytes);
    if constexpr (R > 1) tiles.template load<1>(&sums[R - 1][token], kTileBytes);
    if constexpr (M > 1) tiles.template load<2>(&sums[0][token + kTileRows], kTileBytes);
    if constexpr (M > 1 && R > 1) tiles.template load<3>(&sums[R - 1][token + kTileRows], kTileBytes);
    for (int step = 0; step < count / kTileRows; ++step, q += kTileBytes) {
        tiles.template load<4>(q, stride);
        tiles.template load<6>(weights[0] + step * kTile, kTileBytes);
        tiles.template multiply_int8<0, 4, 6>();
        if constexpr (R > 1) {
            tiles.template load<7>(weights[R - 1] + step * kTile, kTileBytes);
            tiles.template multiply_int8<1, 4, 7>();
        }
        if constexpr (M > 1) {
            tiles.template load<5>(q + kTileRows * stride, stride);
            tiles.template multiply_int8<2, 5, 6>();
            if constexpr (R > 1) tiles.template multiply_int8<3, 5, 7>();
        }
    }
    tiles.template store<0>(&sums[0][token], kTileBytes);
    if constexpr (R > 1) tiles.template store<1>(&sums[R - 1][token], kTileBytes);
    if constexpr (M > 1) tiles.template store<2>(&sums[0][token + kTileRows], kTileBytes);
    if constexpr (M > 1 && R > 1) tiles.template store<3>(&sums[R - 1][token + kTileRows], kTileBytes);
}

// How expanded vectors meet many tokens: by tiles. Reads rows of q up to a multiple of 16 tokens.
template <class Tiles>
class TileUnit {
  public:
    static constexpr int kFewTokens = 0, kVectors = 256, kMultiple = kTileRows;

    TileUnit() { tiles_.begin(); }
    ~TileUnit() { tiles_.end(); }

    template <int R>
    void add(const std::uint8_t* const* weights, int count, const std::uint8_t* q, std::size_t stride,
             __m512i (*sums)[kSuperBlock], int tokens) {
        int token = 0;
        for (; token + kTileRows < tokens; token += 2 * kTileRows)
            multiply_block<Tiles, R, 2>(tiles_, weights, count, q + token * stride, stride, sums, token);
        if (token < tokens)
            multiply_block<Tiles, R, 1>(tiles_, weights, count, q + token * stride, stride, sums, token);
    }

  private:
    Tiles tiles_;
};

template <Values kValues, Storage kStorage, class Tiles>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    if constexpr (kStorage == Storage::blocks) {
        if (x.num_tokens <= kVectorTokens) return avx512::matmul_i8_blocks(w, begin, end, x, y_TN, stride);
    } else if (x.num_tokens <= kVectorTokens) {
        return avx512::matmul<kValues, kStorage>(w, begin, end, x, y_TN, stride);
    }
    avx512::matmul_on<kValues, kStorage>(TileUnit<Tiles>(), w, begin, end, x, y_TN, stride);
}

template <Values kValues, Storage kStorage, class Tiles>
void accumulate(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                std::size_t stride) {
    if constexpr (kStorage == Storage::blocks) {
        if (x.num_tokens <= kVectorTokens)
            return avx512::accumulate_i8_blocks(w, begin, end, x, acc_TN, stride);
    } else if (x.num_tokens <= kVectorTokens) {
        return avx512::accumulate<kValues, kStorage>(w, begin, end, x, acc_TN, stride);
    }
    avx512::accumulate_on<kValues, kStorage>(TileUnit<Tiles>(), w, begin, end, x, acc_TN, stride);
}

}  // namespace

GOSSAMER_MATMUL(i8, dense, Hardware)
GOSSAMER_MATMUL(i8, sparse, Hardware)
GOSSAMER_MATMUL(i8, blocks, Hardware)
GOSSAMER_MATMUL(i4, dense, Hardware)
GOSSAMER_MATMUL(i4, sparse, Hardware)
GOSSAMER_ACCUMULATE(i8, dense, Hardware)
GOSSAMER_ACCUMULATE(i8, sparse, Hardware)
GOSSAMER_ACCUMULATE(i8, blocks, Hardware)
GOSSAMER_ACCUMULATE(i4, dense, Hardware)
GOSSAMER_ACCUMULATE(i4, sparse, Hardware)

}  // namespace amx

namespace amx_emulated {

using amx::accumulate;
using amx::matmul;

GOSSAMER_MATMUL(i8, dense, amx::Emulated)
GOSSAMER_MATMUL(i8, sparse, amx::Emulated)
GOSSAMER_MATMUL(i8, blocks, amx::Emulated)
GOSSAMER_MATMUL(i4, dense, amx::Emulated)
GOSSAMER_MATMUL(i4, sparse, amx::Emulated)
GOSSAMER_ACCUMULATE(i8, dense, amx::Emulated)
GOSSAMER_ACCUMULATE(i8, sparse, amx::Emulated)
GOSSAMER_ACCUMULATE(i8, blocks, amx::Emulated)
GOSSAMER_ACCUMULATE(i4, dense, amx::Emulated)
GOSSAMER_ACCUMULATE(i4, sparse, amx::Emulated)

}  // namespace amx_emulated
GOSSAMER_END

}  // namespace gossamer
