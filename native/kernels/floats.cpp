// Products of float32 or bfloat16 weights, dense and sparse, and float32 activations.
//
//   y[t, n] = sum over even k of w[n, k] x[t, k]  +  sum over odd k of w[n, k] x[t, k]
//
// Two chains of fused multiply-adds in the order of k, added at the end: the same on every level but amx, for
// any number of tokens and threads, dense or sparse (a product with 0 changes no sum). f32: a vector is 16
// rows x 1 input. bf16: 16 rows x 2 inputs, widened by a shift and a mask (`vdpbf16ps` takes two cycles and
// rounds x). Bound by memory for one token: 64 bytes a dense vector; at 70% zeros 21 (f32) and 23 (bf16)
// bytes, for some 3 and 5 cycles. Above 4 tokens a run of vectors is expanded once for blocks of 6 tokens.
// `amx` (bf16): x is split into two bfloat16, x = high + low, a product each: y to about 2^-16 of sum |w x|.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/expand.hpp"
#include "kernels/kernels.hpp"
#include "kernels/target.hpp"
#include "kernels/tiles.hpp"

namespace gossamer {
namespace {

constexpr int kSuperBlock = 256;  // tokens that share one expansion of the weights

}  // namespace

namespace scalar {

template <Values kValues, Storage kStorage>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    constexpr int kInputs = inputs_per_vector(kValues);
    const auto widen = [](const std::uint8_t* weight) {
        if (kValues == Values::f32) return load_as<float>(weight);
        return std::bit_cast<float>(std::uint32_t(load_as<std::uint16_t>(weight)) << 16);
    };
    for (int panel = begin; panel < end; ++panel) {
        for (int t = 0; t < x.num_tokens; ++t) {
            float chains[2][kPanelRows] = {};
            const std::uint8_t* position = w.panel(panel);
            for (int first = 0; first < w.num_vectors(); first += kGroupVectors) {
                const int count = std::min(kGroupVectors, w.num_vectors() - first);
                std::uint8_t expanded[kGroupVectors * kVectorBytes];
                position = expand<kValues, kStorage>(position, nullptr, count, expanded);
                for (int i = 0; i < count * kPanelRows * kInputs; ++i) {
                    const int row = i / kInputs % kPanelRows;
                    const int k = (first + i / (kPanelRows * kInputs)) * kInputs + i % kInputs;
                    float& sum = chains[k % 2][row];
                    sum =
                        std::fma(widen(expanded + i * bytes_per_value(kValues)), x.x[t * x.stride + k], sum);
                }
            }
            float* y = y_TN + t * stride + panel * kPanelRows;
            for (int row = 0; row < kPanelRows; ++row) y[row] = chains[0][row] + chains[1][row];
        }
    }
}

}  // namespace scalar

GOSSAMER_BEGIN_AVX2
namespace avx2 {
namespace {

constexpr int kTokens = 2;

// 8 rows of two consecutive inputs.
struct Weights {
    __m256 even, odd;
};

// Rows 8 * half and up of inputs 2 i and 2 i + 1 of expanded vectors.
template <Values kValues>
inline Weights load_weights(const std::uint8_t* weights, int i, int half) {
    if constexpr (kValues == Values::f32) {
        const float* rows = reinterpret_cast<const float*>(weights) + 32 * i + 8 * half;
        return {_mm256_loadu_ps(rows), _mm256_loadu_ps(rows + 16)};
    } else {
        const auto* rows = reinterpret_cast<const __m256i*>(weights) + 2 * i + half;
        const __m256i both = _mm256_loadu_si256(rows), high = _mm256_set1_epi32(std::int32_t(0xFFFF0000));
        return {_mm256_castsi256_ps(_mm256_slli_epi32(both, 16)),
                _mm256_castsi256_ps(_mm256_and_si256(both, high))};
    }
}

// Adds the products of `num_pairs` pairs of inputs to sums [T][2 halves][2 chains].
template <Values kValues, int T>
void add_chunk(const std::uint8_t* weights, int num_pairs, const float* x, std::size_t stride,
               __m256 (*sums)[2][2]) {
    __m256 acc[T][2][2];
    std::memcpy(acc, sums, sizeof acc);
    for (int i = 0; i < num_pairs; ++i, x += 2) {
        for (int half = 0; half < 2; ++half) {
            const Weights w = load_weights<kValues>(weights, i, half);
            for (int t = 0; t < T; ++t) {
                const float* inputs = x + t * stride;
                acc[t][half][0] = _mm256_fmadd_ps(w.even, _mm256_broadcast_ss(inputs), acc[t][half][0]);
                acc[t][half][1] = _mm256_fmadd_ps(w.odd, _mm256_broadcast_ss(inputs + 1), acc[t][half][1]);
            }
        }
    }
    std::memcpy(sums, acc, sizeof acc);
}

}  // namespace

template <Values kValues, Storage kStorage>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    alignas(32) std::uint8_t expanded[kChunkVectors * kVectorBytes];
    __m256 sums[kSuperBlock][2][2];
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
                const int pairs = kValues == Values::f32 ? (count + 1) / 2 : count;
                const float* inputs = x.x + origin * x.stride + std::size_t(v) * inputs_per_vector(kValues);
                int t = 0;
                for (; t + kTokens <= tokens; t += kTokens)
                    add_chunk<kValues, kTokens>(weights, pairs, inputs + t * x.stride, x.stride, sums + t);
                for (; t < tokens; ++t)
                    add_chunk<kValues, 1>(weights, pairs, inputs + t * x.stride, x.stride, sums + t);
            }
            for (int t = 0; t < tokens; ++t) {
                float* y = y_TN + (origin + t) * stride + panel * kPanelRows;
                for (int half = 0; half < 2; ++half)
                    _mm256_storeu_ps(y + 8 * half, _mm256_add_ps(sums[t][half][0], sums[t][half][1]));
            }
        }
    }
}

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

constexpr int kTokens = 6;

// 16 rows of two consecutive inputs.
struct Weights {
    __m512 even, odd;
};

inline Weights widen(__m512i both) {
    const __m512i high = _mm512_set1_epi32(std::int32_t(0xFFFF0000));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(both, high))};
}

// The two chains of 16 rows for T tokens.
template <int T>
struct Chains {
    __m512 even[T], odd[T];

    [[gnu::always_inline]] inline void add(Weights w, const RowPointers<float, T>& x, int skip) {
        unrolled<T>([&](auto t) {
            even[t] = _mm512_fmadd_ps(w.even, _mm512_set1_ps(x.row(t)[skip]), even[t]);
            odd[t] = _mm512_fmadd_ps(w.odd, _mm512_set1_ps(x.row(t)[skip + 1]), odd[t]);
        });
    }
};

// One panel for T tokens, straight from the file.
template <Values kValues, Storage kStorage, int T>
void few(const Linear& w, int panel, const Activations& x, float* y, std::size_t stride) {
    Reader<kValues, kStorage> reader{w.panel(panel)};
    RowPointers<float, T> inputs(x.x, x.stride);
    Chains<T> chains;
    unrolled<T>([&](auto t) { chains.even[t] = chains.odd[t] = _mm512_setzero_ps(); });
    if constexpr (kValues == Values::f32) {
        reader.read(
            w.num_vectors(),
            [&](__m512i a, __m512i b) {
                chains.add({_mm512_castsi512_ps(a), _mm512_castsi512_ps(b)}, inputs, 0);
                inputs.advance(2);
            },
            [&](__m512i a) { chains.add({_mm512_castsi512_ps(a), _mm512_setzero_ps()}, inputs, 0); });
    } else {
        reader.read(
            w.num_vectors(),
            [&](__m512i a, __m512i b) {
                chains.add(widen(a), inputs, 0);
                chains.add(widen(b), inputs, 2);
                inputs.advance(4);
            },
            [&](__m512i a) { chains.add(widen(a), inputs, 0); });
    }
    unrolled<T>(
        [&](auto t) { _mm512_storeu_ps(y + t * stride, _mm512_add_ps(chains.even[t], chains.odd[t])); });
}

// Adds the products of `num_pairs` pairs of inputs of R panels and T tokens to sums [R][kSuperBlock][2].
template <Values kValues, int R, int T>
void add_chunk(const std::uint8_t* const* weights, int num_pairs, const float* x, std::size_t stride,
               __m512 (*sums)[2 * kSuperBlock], int token) {
    Chains<T> chains[R];
    const std::uint8_t* rows[R];
    for (int r = 0; r < R; ++r) rows[r] = weights[r];
    unrolled<R * T>([&](auto i) {
        const __m512* sum = sums[i / T] + 2 * (token + i % T);
        chains[i / T].even[i % T] = sum[0];
        chains[i / T].odd[i % T] = sum[1];
    });
    RowPointers<float, T> inputs(x, stride);
    for (int i = 0; i < num_pairs; ++i, inputs.advance(2)) {
        for (int r = 0; r < R; ++r) {
            if constexpr (kValues == Values::f32) {
                const float* pair = reinterpret_cast<const float*>(rows[r]) + 32 * i;
                chains[r].add({_mm512_loadu_ps(pair), _mm512_loadu_ps(pair + 16)}, inputs, 0);
            } else {
                const __m512i both = _mm512_loadu_si512(rows[r] + std::size_t(i) * kVectorBytes);
                chains[r].add(widen(both), inputs, 0);
            }
        }
    }
    unrolled<R * T>([&](auto i) {
        __m512* sum = sums[i / T] + 2 * (token + i % T);
        sum[0] = chains[i / T].even[i % T];
        sum[1] = chains[i / T].odd[i % T];
    });
}

// As many tokens as are left, T at a time.
template <Values kValues, int R, int T>
void add_tokens(const std::uint8_t* const* weights, int num_pairs, const float* x, std::size_t stride,
                __m512 (*sums)[2 * kSuperBlock], int token, int tokens) {
    for (; token + T <= tokens; token += T)
        add_chunk<kValues, R, T>(weights, num_pairs, x + token * stride, stride, sums, token);
    if constexpr (T > 1) {
        if (token < tokens)
            add_tokens<kValues, R, (T + 1) / 2>(weights, num_pairs, x, stride, sums, token, tokens);
    }
}

// How expanded vectors meet many tokens: here by multiply-adds, in two chains.
template <Values kValues>
struct VectorUnit {
    static constexpr int kFewTokens = 4;            // up to which vectors come straight from the file
    static constexpr int kVectors = kChunkVectors;  // of a panel, expanded at a time
    static constexpr int kMultiple = 2;             // their number is filled up to a multiple of this
    static constexpr int kChains = 2;

    template <int R>
    void add(const std::uint8_t* const* weights, int count, const Activations& x, int origin, int input,
             __m512 (*sums)[kChains * kSuperBlock], int tokens) const {
        const int pairs = count * inputs_per_vector(kValues) / 2;
        add_tokens<kValues, R, kTokens>(weights, pairs, x.x + origin * x.stride + input, x.stride, sums, 0,
                                        tokens);
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
            if (lies_expanded(kValues, kStorage) && filled == count) {
                weights[r] = w.panel(panel + r) + std::size_t(v) * kVectorBytes;
                position[r] = weights[r] + std::size_t(count) * kVectorBytes;
                continue;
            }
            position[r] = expand<kValues, kStorage>(position[r], nullptr, count, expanded[r]);
            std::memset(expanded[r] + count * kVectorBytes, 0, std::size_t(filled - count) * kVectorBytes);
            weights[r] = expanded[r];
        }
        unit.template add<R>(weights, filled, x, origin, v * inputs_per_vector(kValues), sums, tokens);
    }
    for (int r = 0; r < R; ++r) {
        for (int t = 0; t < tokens; ++t) {
            __m512 sum = sums[r][Unit::kChains * t];
            if (Unit::kChains == 2) sum = _mm512_add_ps(sum, sums[r][Unit::kChains * t + 1]);
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

}  // namespace

template <Values kValues, Storage kStorage>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    matmul_on<kValues, kStorage>(VectorUnit<kValues>(), w, begin, end, x, y_TN, stride);
}

}  // namespace avx512
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

}  // namespace

template <Storage kStorage, class Tiles>
void matmul_bf16(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    if (x.num_tokens <= kVectorTokens)
        return avx512::matmul<Values::bf16, kStorage>(w, begin, end, x, y_TN, stride);
    avx512::matmul_on<Values::bf16, kStorage>(TileUnit<Tiles>(), w, begin, end, x, y_TN, stride);
}

}  // namespace amx
GOSSAMER_END

#define GOSSAMER_ROWS(kValues, kStorage)                                                               \
    MatmulRow{kValues, kStorage, Isa::scalar, scalar::matmul<kValues, kStorage>, nullptr},             \
        MatmulRow{kValues, kStorage, Isa::avx2, avx2::matmul<kValues, kStorage>, nullptr}, MatmulRow { \
        kValues, kStorage, Isa::avx512, avx512::matmul<kValues, kStorage>, nullptr                     \
    }
#define GOSSAMER_TILE_ROW(kStorage, Tiles) \
    MatmulRow { Values::bf16, kStorage, Isa::amx, amx::matmul_bf16<kStorage, amx::Tiles>, nullptr }

const MatmulRow kFloatRows[14] = {
    GOSSAMER_ROWS(Values::f32, Storage::dense),  GOSSAMER_ROWS(Values::f32, Storage::sparse),
    GOSSAMER_ROWS(Values::bf16, Storage::dense), GOSSAMER_ROWS(Values::bf16, Storage::sparse),
    GOSSAMER_TILE_ROW(Storage::dense, Hardware), GOSSAMER_TILE_ROW(Storage::sparse, Hardware)};
const MatmulRow kEmulatedFloatRows[2] = {GOSSAMER_TILE_ROW(Storage::dense, Emulated),
                                         GOSSAMER_TILE_ROW(Storage::sparse, Emulated)};

}  // namespace gossamer
