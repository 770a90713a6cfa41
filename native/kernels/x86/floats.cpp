// Products of float32 or bfloat16 weights by vectors and by tiles: see ../scalar/floats.cpp.
//
// A bf16 vector is widened by a shift and a mask. A chain for each input of a pair of vectors hides the 4
// cycles of a multiply-add. Above 4 tokens a run of vectors is expanded once for blocks of tokens. `amx`
// (bf16): x is split into two bfloat16, x = high + low, a product each: y to about 2^-16 of sum |w x|.
//
// `avx512_bf16`: x is high alone, the nearest bfloat16 (halves to even): y to 2^-8 of sum |w x|. A row has
// one chain, in which `vdpbf16ps` fuses the products of two inputs, the second one first, each rounded to
// even; what is below 2^-126 counts as zero, as in tiles. A vector and a token take one instruction, where
// multiply-adds are two, and products of low as well would be two again. AMD since Zen 4 runs as many
// `vdpbf16ps` a cycle as multiply-adds, Intel a fourth. Few tokens, and zeros that are worth skipping, are
// left to avx512, which rounds nothing.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/kernels.hpp"
#include "kernels/x86/expand_avx2.hpp"
#include "kernels/x86/expand_avx512.hpp"
#include "kernels/x86/float_strips.hpp"
#include "kernels/x86/target.hpp"
#include "kernels/x86/tiles.hpp"

namespace gossamer {

GOSSAMER_BEGIN_AVX2
namespace avx2 {
namespace {

constexpr int kTokens = 3;

// The chains of 8 rows.
template <Values kValues>
using Chains = __m256[2 * inputs_per_vector(kValues)];

// Adds the products of a run of expanded vectors (an even number) to the sums of T tokens, 8 rows from
// `half`.
template <Values kValues, int T>
void add_chunk(const std::uint8_t* weights, int count, const float* x, std::size_t stride,
               Chains<kValues> (*sums)[2], int half) {
    constexpr int kInputs = inputs_per_vector(kValues);
    __m256 acc[T][2 * kInputs];
    unrolled<2 * kInputs * T>([&](auto i) { acc[i % T][i / T] = sums[i % T][half][i / T]; });
    RowPointers<float, T> inputs(x, stride);
    for (int v = 0; v < count; v += 2, inputs.advance(2 * kInputs)) {
        const __m256i* rows = reinterpret_cast<const __m256i*>(weights + v * kVectorBytes) + half;
        unrolled<2 * kInputs * T>([&](auto i) {
            constexpr int kChain = i / T, kToken = i % T;
            __m256i bits = _mm256_loadu_si256(rows + kChain / kInputs * 2);
            if constexpr (kInputs == 2) {
                bits = kChain % 2 ? _mm256_and_si256(bits, _mm256_set1_epi32(std::int32_t(0xFFFF0000)))
                                  : _mm256_slli_epi32(bits, 16);
            }
            acc[kToken][kChain] =
                _mm256_fmadd_ps(_mm256_castsi256_ps(bits), _mm256_broadcast_ss(inputs.row(kToken) + kChain),
                                acc[kToken][kChain]);
        });
    }
    unrolled<2 * kInputs * T>([&](auto i) { sums[i % T][half][i / T] = acc[i % T][i / T]; });
}

// As many tokens as are left, T at a time.
template <Values kValues, int T>
void add_tokens(const std::uint8_t* weights, int count, const float* x, std::size_t stride,
                Chains<kValues> (*sums)[2], int token, int tokens) {
    for (; token + T <= tokens; token += T) {
        for (int half = 0; half < 2; ++half)
            add_chunk<kValues, T>(weights, count, x + token * stride, stride, sums + token, half);
    }
    if constexpr (T > 1) {
        if (token < tokens) add_tokens<kValues, T - 1>(weights, count, x, stride, sums, token, tokens);
    }
}

template <Values kValues, Storage kStorage>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    alignas(32) std::uint8_t expanded[kChunkVectors * kVectorBytes];
    Chains<kValues> sums[kSuperBlock][2];  // [token][half of the rows]
    for (int panel = begin; panel < end; ++panel) {
        for (int origin = 0; origin < x.num_tokens; origin += kSuperBlock) {
            const int tokens = std::min(kSuperBlock, x.num_tokens - origin);
            std::memset(sums, 0, tokens * sizeof sums[0]);
            const std::uint8_t* position = w.panel(panel);
            for (int v = 0; v < w.num_vectors(); v += kChunkVectors) {
                const int count = std::min(kChunkVectors, w.num_vectors() - v);
                const std::uint8_t* weights = expanded;
                if constexpr (kStorage == Storage::sparse) {
                    position = expand<kValues, kStorage>(position, nullptr, count, expanded);
                } else if (count % 2 == 0) {
                    weights = position + std::size_t(v) * kVectorBytes;
                } else {
                    std::memcpy(expanded, position + std::size_t(v) * kVectorBytes, count * kVectorBytes);
                }
                if (count % 2) std::memset(expanded + count * kVectorBytes, 0, kVectorBytes);
                const float* inputs = x.x + origin * x.stride + std::size_t(v) * inputs_per_vector(kValues);
                add_tokens<kValues, kTokens>(weights, int(round_up(count, 2)), inputs, x.stride, sums, 0,
                                             tokens);
            }
            for (int t = 0; t < tokens; ++t) {
                float* y = y_TN + (origin + t) * stride + panel * kPanelRows;
                for (int half = 0; half < 2; ++half) {
                    const __m256* chains = sums[t][half];
                    __m256 sum = _mm256_add_ps(chains[0], chains[1]);
                    if constexpr (kValues == Values::bf16)
                        sum = _mm256_add_ps(sum, _mm256_add_ps(chains[2], chains[3]));
                    _mm256_storeu_ps(y + 8 * half, sum);
                }
            }
        }
    }
}

}  // namespace

GOSSAMER_MATMUL(f32, dense)
GOSSAMER_MATMUL(f32, sparse)
GOSSAMER_MATMUL(bf16, dense)
GOSSAMER_MATMUL(bf16, sparse)

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

// The chains of 16 rows for T tokens: [vector of a pair][input of a vector][token].
template <Values kValues, int T>
struct Chains {
    static constexpr int kInputs = inputs_per_vector(kValues), kCount = 2 * kInputs;
    __m512 sums[kCount][T];

    // Multiplies vector `parity` of a pair with its inputs, from x.row(t)[parity * kInputs] on.
    template <int kParity>
    [[gnu::always_inline]] inline void add(__m512i vector, const RowPointers<float, T>& x) {
        const __m512i high = _mm512_set1_epi32(std::int32_t(0xFFFF0000));
        __asm__("" : "+v"(vector));  // one load for both of its uses
        unrolled<kInputs * T>([&](auto i) {
            constexpr int kInput = i / T, kToken = i % T, kChain = kParity * kInputs + kInput;
            __m512i bits = vector;
            if (kInputs == 2) bits = kInput ? _mm512_and_si512(vector, high) : _mm512_slli_epi32(vector, 16);
            __m512& sum = sums[kChain][kToken];
            sum = _mm512_fmadd_ps(_mm512_castsi512_ps(bits), _mm512_set1_ps(x.row(kToken)[kChain]), sum);
        });
    }
    __m512 total(int t) const {
        __m512 sum = _mm512_add_ps(sums[0][t], sums[1][t]);
        if constexpr (kCount == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(sums[2][t], sums[3][t]));
        return sum;
    }
};

// One panel for T tokens, straight from the file.
template <Values kValues, Storage kStorage, int T>
void few(const Linear& w, int panel, const Activations& x, float* y, std::size_t stride) {
    using Sums = Chains<kValues, T>;
    Reader<kValues, kStorage> reader{w.panel(panel)};
    RowPointers<float, T> inputs(x.x, x.stride);
    Sums chains;
    unrolled<Sums::kCount * T>([&](auto i) { chains.sums[i / T][i % T] = _mm512_setzero_ps(); });
    reader.read(
        w.num_vectors(),
        [&](__m512i a, __m512i b) __attribute__((always_inline)) {
            chains.template add<0>(a, inputs);
            chains.template add<1>(b, inputs);
            inputs.advance(Sums::kCount);
        },
        [&](__m512i a) __attribute__((always_inline)) { chains.template add<0>(a, inputs); });
    unrolled<T>([&](auto t) { _mm512_storeu_ps(y + t * stride, chains.total(t)); });
}

// Adds the products of `count` expanded vectors (an even number) of R panels and T tokens to
// sums [R][token][chain].
template <Values kValues, int R, int T>
void add_chunk(const std::uint8_t* const* weights, int count, const float* x, std::size_t stride,
               __m512 (*sums)[Chains<kValues, T>::kCount * kSuperBlock], int token) {
    using Sums = Chains<kValues, T>;
    constexpr int kEach = Sums::kCount * T;
    Sums chains[R];
    const std::uint8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = weights[r];
    unrolled<R * kEach>([&](auto i) {
        constexpr int kChain = i % kEach / T, kToken = i % T;
        chains[i / kEach].sums[kChain][kToken] = sums[i / kEach][Sums::kCount * (token + kToken) + kChain];
    });
    RowPointers<float, T> inputs(x, stride);
    for (int v = 0; v < count; v += 2, inputs.advance(Sums::kCount)) {
        for (int r = 0; r < R; ++r) {
            const std::uint8_t* pair = rows[r] + std::size_t(v) * kVectorBytes;
            chains[r].template add<0>(_mm512_loadu_si512(pair), inputs);
            chains[r].template add<1>(_mm512_loadu_si512(pair + kVectorBytes), inputs);
        }
    }
    unrolled<R * kEach>([&](auto i) {
        constexpr int kChain = i % kEach / T, kToken = i % T;
        sums[i / kEach][Sums::kCount * (token + kToken) + kChain] = chains[i / kEach].sums[kChain][kToken];
    });
}

// As many tokens as are left, T at a time.
template <Values kValues, int R, int T, int kNumSums>
void add_tokens(const std::uint8_t* const* weights, int count, const float* x, std::size_t stride,
                __m512 (*sums)[kNumSums], int token, int tokens) {
    for (; token + T <= tokens; token += T)
        add_chunk<kValues, R, T>(weights, count, x + token * stride, stride, sums, token);
    if constexpr (T > 1) {
        if (token < tokens)
            add_tokens<kValues, R, (T + 1) / 2>(weights, count, x, stride, sums, token, tokens);
    }
}

// How expanded vectors meet many tokens: here by multiply-adds, 24 sums in registers.
template <Values kValues>
struct VectorUnit {
    static constexpr int kFewTokens = 4;            // up to which vectors come straight from the file
    static constexpr int kVectors = kChunkVectors;  // of a panel, expanded at a time
    static constexpr int kMultiple = 2;             // their number is filled up to a multiple of this
    static constexpr int kChains = Chains<kValues, 1>::kCount;

    template <int R>
    void add(const std::uint8_t* const* weights, int count, const Activations& x, int origin, int input,
             __m512 (*sums)[kChains * kSuperBlock], int tokens) const {
        add_tokens<kValues, R, 12 / kChains>(weights, count, x.x + origin * x.stride + input, x.stride, sums,
                                             0, tokens);
    }
};

// R panels and up to kSuperBlock tokens from `origin` on.
template <Values kValues, Storage kStorage, int R, class Unit>
void many(const Linear& w, int panel, const Activations& x, int origin, Unit& unit, float* y_TN,
          std::size_t stride) {
    alignas(64) std::uint8_t expanded[R][Unit::kVectors * kVectorBytes];
    alignas(64) __m512 sums[R][Unit::kChains * kSuperBlock];
    const int tokens = std::min(kSuperBlock, x.num_tokens - origin);
    const std::uint8_t *position[R], *weights[R];
    for (int r = 0; r < R; ++r) {
        position[r] = w.panel(panel + r);
        for (int t = 0; t < Unit::kChains * int(round_up(tokens, 16)); ++t) sums[r][t] = _mm512_setzero_ps();
    }
    for (int v = 0; v < w.num_vectors(); v += Unit::kVectors) {
        const int count = std::min(Unit::kVectors, w.num_vectors() - v);
        const int filled = int(round_up(count, Unit::kMultiple));
        for (int r = 0; r < R; ++r) {
            weights[r] =
                expanded_run<kValues, kStorage>(w, panel + r, v, count, filled, position[r], expanded[r]);
        }
        unit.template add<R>(weights, filled, x, origin, v * inputs_per_vector(kValues), sums, tokens);
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < tokens; ++t) {
            const __m512* chains = sums[r] + Unit::kChains * t;
            __m512 sum = chains[0];
            if constexpr (Unit::kChains > 1) sum = _mm512_add_ps(sum, chains[1]);
            if constexpr (Unit::kChains > 2) sum = _mm512_add_ps(sum, _mm512_add_ps(chains[2], chains[3]));
            _mm512_storeu_ps(y_TN + (origin + t) * stride + (panel + r) * kPanelRows, sum);
        }
    }
}

template <Values kValues, Storage kStorage, class Unit>
void matmul_on(Unit&& unit, const Linear& w, int begin, int end, const Activations& x, float* y_TN,
               std::size_t stride) {
    const auto all_few = [&]<int T>(std::integral_constant<int, T>) {
        for (int panel = begin; panel < end; ++panel)
            few<kValues, kStorage, T>(w, panel, x, y_TN + panel * kPanelRows, stride);
    };
    bool done = false;
    unrolled<Unit::kFewTokens>([&](auto i) {
        if (x.num_tokens == i + 1) all_few(std::integral_constant<int, i + 1>()), done = true;
    });
    if (done) return;
    for (int origin = 0; origin < x.num_tokens; origin += kSuperBlock) {
        int panel = begin;
        for (; panel + 2 <= end; panel += 2)
            many<kValues, kStorage, 2>(w, panel, x, origin, unit, y_TN, stride);
        if (panel < end) many<kValues, kStorage, 1>(w, panel, x, origin, unit, y_TN, stride);
    }
}

template <Values kValues, Storage kStorage>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    if constexpr (kStorage == Storage::sparse) {
        using Strips = FloatStrips<kValues>;
        if (Strips::pays(w, x.num_tokens)) return Strips::matmul(w, begin, end, x, y_TN, stride);
    }
    matmul_on<kValues, kStorage>(VectorUnit<kValues>(), w, begin, end, x, y_TN, stride);
}

}  // namespace

GOSSAMER_MATMUL(f32, dense)
GOSSAMER_MATMUL(f32, sparse)
GOSSAMER_MATMUL(bf16, dense)
GOSSAMER_MATMUL(bf16, sparse)

}  // namespace avx512
GOSSAMER_END

GOSSAMER_BEGIN_AVX512_BF16
namespace avx512_bf16 {
namespace {

constexpr double kDense = 0.5;  // of what dense products by multiply-adds cost

// Adds the products of `count` expanded vectors of R panels and T tokens to sums [R][token].
template <int R, int T>
void add_chunk(const std::uint8_t* const* weights, int count, const std::uint16_t* x, std::size_t stride,
               __m512 (*sums)[kSuperBlock], int token) {
    constexpr int kInputs = inputs_per_vector(Values::bf16);
    __m512 acc[R][T];
    const std::uint8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = weights[r];
    unrolled<R * T>([&](auto i) { acc[i / T][i % T] = sums[i / T][token + i % T]; });
    RowPointers<std::uint16_t, T> inputs(x, stride);
    for (int v = 0; v < count; ++v, inputs.advance(kInputs)) {
        __m512i vectors[R];
        for (int r = 0; r < R; ++r) vectors[r] = _mm512_loadu_si512(rows[r] + std::size_t(v) * kVectorBytes);
        unrolled<T>([&](auto t) {
            std::int32_t pair;
            std::memcpy(&pair, inputs.row(t), sizeof pair);
            const __m512i both = _mm512_set1_epi32(pair);
            for (int r = 0; r < R; ++r)
                acc[r][t] = _mm512_dpbf16_ps(acc[r][t], (__m512bh)vectors[r], (__m512bh)both);
        });
    }
    unrolled<R * T>([&](auto i) { sums[i / T][token + i % T] = acc[i / T][i % T]; });
}

// As many tokens as are left, T at a time.
template <int R, int T>
void add_tokens(const std::uint8_t* const* weights, int count, const std::uint16_t* x, std::size_t stride,
                __m512 (*sums)[kSuperBlock], int token, int tokens) {
    for (; token + T <= tokens; token += T)
        add_chunk<R, T>(weights, count, x + token * stride, stride, sums, token);
    if constexpr (T > 1) {
        if (token < tokens) add_tokens<R, (T + 1) / 2>(weights, count, x, stride, sums, token, tokens);
    }
}

// How expanded vectors meet many tokens: two inputs at a time, 24 sums in registers.
struct PairUnit {
    static constexpr int kFewTokens = 0, kVectors = kChunkVectors, kMultiple = 1, kChains = 1;

    template <int R>
    void add(const std::uint8_t* const* weights, int count, const Activations& x, int origin, int input,
             __m512 (*sums)[kSuperBlock], int tokens) const {
        add_tokens<R, 12>(weights, count, x.high + origin * x.stride + input, x.stride, sums, 0, tokens);
    }
};

template <Values kValues, Storage kStorage>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    const bool few = x.num_tokens <= avx512::VectorUnit<kValues>::kFewTokens;
    if (few || (kStorage == Storage::sparse && avx512::FloatStrips<kValues>::pays(w, x.num_tokens, kDense)))
        return avx512::matmul<kValues, kStorage>(w, begin, end, x, y_TN, stride);
    avx512::matmul_on<kValues, kStorage>(PairUnit(), w, begin, end, x, y_TN, stride);
}

}  // namespace

GOSSAMER_MATMUL(bf16, dense)
GOSSAMER_MATMUL(bf16, sparse)

}  // namespace avx512_bf16
GOSSAMER_END

GOSSAMER_BEGIN_AMX
namespace amx {
namespace {

// 16 tokens and R panels: x in two parts against the same weights.
template <class Tiles, int R>
void multiply_block(Tiles& tiles, const std::uint8_t* const* weights, int count, const std::uint16_t* high,
                    const std::uint16_t* low, std::size_t stride, __m512 (*sums)[kSuperBlock], int token) {
    constexpr std::size_t kTile = kTileRows * kTileBytes, kInputs = kTileBytes / 2;
    tiles.template load<0>(&sums[0][token], kTileBytes);
    if constexpr (R > 1) tiles.template load<1>(&sums[R - 1][token], kTileBytes);
    for (int step = 0; step < count / kTileRows; ++step, high += kInputs, low += kInputs) {
        tiles.template load<4>(high, 2 * stride);
        tiles.template load<5>(low, 2 * stride);
        tiles.template load<6>(weights[0] + step * kTile, kTileBytes);
        tiles.template multiply_bf16<0, 4, 6>();
        if constexpr (R > 1) {
            tiles.template load<7>(weights[R - 1] + step * kTile, kTileBytes);
            tiles.template multiply_bf16<1, 4, 7>();
        }
        tiles.template multiply_bf16<0, 5, 6>();
        if constexpr (R > 1) tiles.template multiply_bf16<1, 5, 7>();
    }
    tiles.template store<0>(&sums[0][token], kTileBytes);
    if constexpr (R > 1) tiles.template store<1>(&sums[R - 1][token], kTileBytes);
}

// How expanded vectors meet many tokens: by tiles. Reads rows of high and low up to a multiple of 16 tokens.
template <class Tiles>
class TileUnit {
  public:
    static constexpr int kFewTokens = 0, kVectors = 256, kMultiple = kTileRows, kChains = 1;

    TileUnit() { tiles_.begin(); }
    ~TileUnit() { tiles_.end(); }

    template <int R>
    void add(const std::uint8_t* const* weights, int count, const Activations& x, int origin, int input,
             __m512 (*sums)[kSuperBlock], int tokens) {
        for (int token = 0; token < tokens; token += kTileRows) {
            const std::size_t begin = (origin + token) * x.stride + input;
            multiply_block<Tiles, R>(tiles_, weights, count, x.high + begin, x.low + begin, x.stride, sums,
                                     token);
        }
    }

  private:
    Tiles tiles_;
};

template <Values kValues, Storage kStorage, class Tiles>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    if (x.num_tokens <= kVectorTokens)
        return avx512::matmul<kValues, kStorage>(w, begin, end, x, y_TN, stride);
    avx512::matmul_on<kValues, kStorage>(TileUnit<Tiles>(), w, begin, end, x, y_TN, stride);
}

}  // namespace

GOSSAMER_MATMUL(bf16, dense, Hardware)
GOSSAMER_MATMUL(bf16, sparse, Hardware)

}  // namespace amx

namespace amx_emulated {

using amx::matmul;

GOSSAMER_MATMUL(bf16, dense, amx::Emulated)
GOSSAMER_MATMUL(bf16, sparse, amx::Emulated)

}  // namespace amx_emulated
GOSSAMER_END

}  // namespace gossamer
