// Products of int8 weights that are stored as blocks, and int8 activations, by AVX-512: only live blocks are
// read and multiplied. See ../scalar/integers.cpp for what is computed, docs/format.md for the storage.
//
// Many tokens: 16 of them are the lanes of a vector. A strip's activations are turned round once,
// [64 blocks][tokens][4], 24 KiB for 96 tokens, and stay in the L1 cache while the rows of many panels go by:
// a live block is one broadcast of its four weights and a load and `vpdpbusd` for each 16 tokens. What limits
// this is loads, 7 for 6 products. The sums of those rows wait in the L2 cache for the next strip.
//
// Few tokens: `vpexpandd` puts a row's live blocks where its mask has ones, 16 blocks at a time, against the
// activations as they lie. Bytes from memory limit one token.

#include <algorithm>
#include <bit>
#include <cstring>

#include "kernels/expand.hpp"
#include "kernels/kernels.hpp"
#include "kernels/x86/row_sums_avx512.hpp"
#include "kernels/x86/target.hpp"
#include "kernels/x86/transpose_avx512.hpp"

GOSSAMER_BEGIN_AVX512
namespace gossamer::avx512 {
namespace {

constexpr int kFewTokens = 8;    // up to which rows are expanded
constexpr int kMostVectors = 6;  // of 16 tokens each, that share a strip's walk
constexpr int kRowPanels = 64;   // whose sums wait for the next strip: 384 KiB
constexpr int kStripBytes = kStripBlocks * kBlockBytes;
constexpr int kMaskBytes = kPanelRows * sizeof(std::uint64_t);

// The activations of a strip and V x 16 tokens from `origin` on, to `turned` [64 blocks][V][16 tokens][4].
// Lanes without a token repeat the last one.
template <int V>
void turn(const Linear& w, const Activations& x, int strip, int origin, std::uint8_t* turned) {
    const int lines = std::min(4, (w.columns - strip * kStripBytes + 63) / 64);
    for (int v = 0; v < V; ++v) {
        for (int line = 0; line < lines; ++line) {
            __m512i words[16];
            for (int t = 0; t < 16; ++t) {
                const int token = std::min(origin + 16 * v + t, x.num_tokens - 1);
                words[t] = _mm512_loadu_si512(x.q + token * x.stride + strip * kStripBytes + 64 * line);
            }
            transpose(words);
            for (int i = 0; i < 16; ++i)
                _mm512_store_si512(turned + ((16 * line + i) * V + v) * kVectorBytes, words[i]);
        }
    }
}

// Adds a panel's strip at `position`, which moves past it, to sums [16 rows][V]. As many blocks at a time as
// hide the latency of vpdpbusd; where a row has no further one, the zeros behind the strip's blocks.
template <int V>
inline void add_strip(const std::uint8_t*& position, const std::uint8_t* turned, __m512i* sums) {
    constexpr int kChains = V == 1 ? 4 : V <= 3 ? 2 : 1;
    const std::uint8_t *masks = position, *next = position + kMaskBytes;
    for (int row = 0; row < kPanelRows; ++row, sums += V) {
        auto mask = load_as<std::uint64_t>(masks + row * sizeof(std::uint64_t));
        const std::uint8_t* end = next + kBlockBytes * std::popcount(mask);
        __m512i acc[kChains][V];
        unrolled<kChains * V>([&](auto i) { acc[i / V][i % V] = i < V ? sums[i] : _mm512_setzero_si512(); });
        for (; next < end; next += kChains * kBlockBytes) {
            unrolled<kChains>([&](auto chain) {
                const std::uint8_t* inputs = turned + _tzcnt_u64(mask) * (V * kVectorBytes);
                mask &= mask - 1;
                const __m512i weights = _mm512_set1_epi32(load_as<std::int32_t>(next + chain * kBlockBytes));
                unrolled<V>([&](auto v) {
                    acc[chain][v] = _mm512_dpbusd_epi32(
                        acc[chain][v], _mm512_load_si512(inputs + v * kVectorBytes), weights);
                });
            });
        }
        next = end;
        unrolled<V>([&](auto v) {
            __m512i sum = acc[0][v];
            unrolled<kChains - 1>([&](auto i) { sum = _mm512_add_epi32(sum, acc[i + 1][v]); });
            sums[v] = sum;
        });
    }
    position = next;
}

// V x 16 tokens, or those of them that there are, from `origin` on.
template <int V, class Sink>
void many(const Linear& w, int begin, int end, const Activations& x, int origin, Sink sink) {
    alignas(64) std::uint8_t turned[(kStripBlocks + 1) * V * kVectorBytes];
    std::memset(turned + kStripBlocks * V * kVectorBytes, 0, V * kVectorBytes);
    alignas(64) __m512i sums[kRowPanels][kPanelRows][V];
    const int tokens = std::min(16 * V, x.num_tokens - origin);
    for (int first = begin; first < end; first += kRowPanels) {
        const int count = std::min(kRowPanels, end - first);
        const std::uint8_t* position[kRowPanels];
        for (int p = 0; p < count; ++p) position[p] = w.panel(first + p);
        std::fill_n(&sums[0][0][0], count * kPanelRows * V, _mm512_setzero_si512());
        for (int strip = 0; strip < w.num_strips(); ++strip) {
            turn<V>(w, x, strip, origin, turned);
            for (int p = 0; p < count; ++p) {
                if (p + 1 < count) _mm_prefetch(position[p + 1], _MM_HINT_T0);
                add_strip<V>(position[p], turned, sums[p][0]);
            }
        }
        for (int p = 0; p < count; ++p) {
            for (int v = 0; v < V; ++v) {
                __m512i rows[16];
                for (int row = 0; row < kPanelRows; ++row) rows[row] = sums[p][row][v];
                transpose(rows);
                for (int t = 0; t < std::min(16, tokens - 16 * v); ++t)
                    sink(first + p, origin + 16 * v + t, rows[t]);
            }
        }
    }
}

// T tokens of one panel.
template <int T, class Sink>
void few(const Linear& w, int panel, const Activations& x, Sink sink) {
    __m512i sums[kPanelRows][T];
    std::fill_n(sums[0], kPanelRows * T, _mm512_setzero_si512());
    const std::uint8_t* position = w.panel(panel);
    for (int strip = 0; strip < w.num_strips(); ++strip) {
        const int lines = std::min(4, (w.columns - strip * kStripBytes + 63) / 64);
        const std::uint8_t* masks = position;
        position += kMaskBytes;
        const RowPointers<std::uint8_t, T> inputs(x.q + strip * kStripBytes, x.stride);
        for (int row = 0; row < kPanelRows; ++row) {
            const auto mask = load_as<std::uint64_t>(masks + row * sizeof(std::uint64_t));
            __m512i acc[T];
            unrolled<T>([&](auto t) { acc[t] = sums[row][t]; });
            unrolled<4>([&](auto line) {
                if (line >= lines) return;
                const auto live = __mmask16(mask >> (16 * line));
                const __m512i weights = _mm512_maskz_expand_epi32(live, _mm512_loadu_si512(position));
                position += kBlockBytes * _mm_popcnt_u32(live);
                unrolled<T>([&](auto t) {
                    const __m512i line_of_inputs = _mm512_loadu_si512(inputs.row(t) + 64 * line);
                    acc[t] = _mm512_dpbusd_epi32(acc[t], line_of_inputs, weights);
                });
            });
            unrolled<T>([&](auto t) { sums[row][t] = acc[t]; });
        }
    }
    for (int t = 0; t < T; ++t) {
        __m512i parts[16];
        for (int row = 0; row < kPanelRows; ++row) parts[row] = sums[row][t];
        transpose(parts);
        __m512i total = parts[0];
        for (int i = 1; i < 16; ++i) total = _mm512_add_epi32(total, parts[i]);
        sink(panel, t, total);
    }
}

template <class Sink>
void product(const Linear& w, int begin, int end, const Activations& x, Sink sink) {
    unrolled<kFewTokens>([&](auto i) {
        if (x.num_tokens != i + 1) return;
        for (int panel = begin; panel < end; ++panel) few<i + 1>(w, panel, x, sink);
    });
    if (x.num_tokens <= kFewTokens) return;
    for (int origin = 0; origin < x.num_tokens;) {
        const int left = (x.num_tokens - origin + 15) / 16;  // vectors of tokens, shared out evenly
        const int walks = (left + kMostVectors - 1) / kMostVectors, vectors = (left + walks - 1) / walks;
        unrolled<kMostVectors>([&](auto i) {
            if (vectors == i + 1) many<i + 1>(w, begin, end, x, origin, sink);
        });
        origin += 16 * vectors;
    }
}

}  // namespace

void matmul_i8_blocks(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                      std::size_t stride) {
    product(w, begin, end, x, OutputSink{w, x, y_TN, stride});
}

void accumulate_i8_blocks(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                          std::size_t stride) {
    product(w, begin, end, x, SumSink{w, acc_TN, stride});
}

}  // namespace gossamer::avx512
GOSSAMER_END
