// Products of sparse float32 or bfloat16 weights by many tokens, by AVX-512: zeros are neither multiplied nor
// expanded into the cache for each token.
//
// Weights are stored input after input, and here a row's have to follow one another: a run of 192 vectors of
// each panel is expanded, turned round and closed up, once for 256 tokens. Then it is a strip of those that
// train with a fixed mask (strips.cpp): a weight is one broadcast, and a load and a multiply-add for each 16
// tokens. A run makes a strip for each chain of ../scalar/floats.cpp, of the inputs that belong to the chain,
// so that a row's sums get the same bits as in any other product.
#pragma once

#include <algorithm>
#include <bit>

#include "kernels/kernels.hpp"
#include "kernels/x86/expand_avx512.hpp"
#include "kernels/x86/transpose_avx512.hpp"

GOSSAMER_BEGIN_AVX512
namespace gossamer::avx512 {

template <Values kValues>
struct FloatStrips {
    static constexpr int kInputs = inputs_per_vector(kValues), kChains = 2 * kInputs;
    static constexpr int kRunVectors = 2 * kStripInputs;  // vectors of a run: those of a chain are a strip
    static constexpr int kRowPanels = 32 / kInputs;       // whose sums wait for the next run
    static constexpr int kRows = kRowPanels * kPanelRows;
    static constexpr int kTiles = kSuperBlock / kTileTokens;
    static constexpr int kFetched = 11;  // cache lines of 32 vectors at 70% zeros

    // Whether this takes less time than expanding zeros. On a Xeon, a weight that lives costs a token of a
    // full tile 1.2 of what dense products by multiply-adds cost, and closing up a weight as much as 18
    // tokens of those; `dense` is what those cost that would run instead.
    static bool pays(const Linear& w, int tokens, double dense = 1) {
        const double masks = double(w.num_panels()) * w.num_vectors() * bytes_per_mask(kValues);
        const double bytes = double(w.panel_bytes(0, w.num_panels())) - masks;
        const double live = bytes / bytes_per_value(kValues) / (double(w.padded_rows()) * w.columns);
        const double filled = double(round_up(std::size_t(tokens), kTileTokens)) / tokens;
        return 1.2 * live * filled + 18.0 / tokens < 0.8 * dense;
    }

    static void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN,
                       std::size_t stride) {
        for (int origin = 0; origin < x.num_tokens; origin += kSuperBlock) {
            for (int panel = begin; panel < end; panel += kRowPanels) {
                FloatStrips strips;
                strips.product(w, panel, std::min(kRowPanels, end - panel), x, origin,
                               y_TN + origin * stride + panel * kPanelRows, stride);
            }
        }
    }

  private:
    // The values of a chain: as many rows as there are, of at most kStripInputs each, and room for a vector
    // behind them.
    struct Chain {
        alignas(64) float values[kRows * kStripInputs + 16];
        std::uint8_t index[kRows * kStripInputs + 16];
        std::uint8_t counts[kRows];
        std::size_t filled;
    };

    Chain chains_[kChains];
    alignas(64) float tiles_[kChains][kStripInputs * kTileTokens];
    alignas(64) float sums_[kTiles][kChains][kRows * kTileTokens];

    // `count` panels from `panel` on, and up to kSuperBlock tokens from `origin` on.
    void product(const Linear& w, int panel, int count, const Activations& x, int origin, float* y_TN,
                 std::size_t stride) {
        const int tokens = std::min(kSuperBlock, x.num_tokens - origin), rows = count * kPanelRows;
        const int num_tiles = (tokens + kTileTokens - 1) / kTileTokens;
        for (int tile = 0; tile < num_tiles; ++tile) {
            for (float* sums : sums_[tile]) std::fill_n(sums, rows * kTileTokens, 0.0f);
        }
        const std::uint8_t* position[kRowPanels];
        for (int p = 0; p < count; ++p) position[p] = w.panel(panel + p);
        for (int v = 0; v < w.num_vectors(); v += kRunVectors) {
            const int vectors = std::min(kRunVectors, w.num_vectors() - v);
            for (Chain& chain : chains_) chain.filled = 0;
            for (int p = 0; p < count; ++p)
                close_up(vectors, position[p], p, position[std::min(p + 1, count - 1)]);
            for (int tile = 0; tile < num_tiles; ++tile) {
                turn(x, origin + tile * kTileTokens, v * kInputs, vectors * kInputs);
                for (int c = 0; c < kChains; ++c) {
                    const Chain& chain = chains_[c];
                    multiply({chain.values, chain.index, chain.counts, rows}, tiles_[c], sums_[tile][c]);
                }
            }
        }
        for (int tile = 0; tile < num_tiles; ++tile) {
            for (int t = 0; t < kTileTokens; t += 16) {
                const int left = std::min(16, tokens - tile * kTileTokens - t);
                for (int p = 0; left > 0 && p < count; ++p)
                    write(sums_[tile], p, t, left, y_TN + (tile * kTileTokens + t) * stride, stride);
            }
        }
    }

    // Appends the rows of a panel's run at `position`, which moves past it, to the chains.
    void close_up(int vectors, const std::uint8_t*& position, int panel, const std::uint8_t* next) {
        alignas(64) std::uint8_t expanded[kRunVectors * kVectorBytes];
        // [parity of the vector][row][vector of that parity]
        alignas(64) std::uint32_t turned[2][kPanelRows][kStripInputs];
        position = expand<kValues, Storage::sparse>(position, nullptr, vectors, expanded);
        const int filled = int(round_up(std::size_t(vectors), 32)), lines = filled / 32;
        std::memset(expanded + vectors * kVectorBytes, 0, std::size_t(filled - vectors) * kVectorBytes);
        for (int line = 0; line < lines; ++line) {
            for (int i = 0; i < 11; ++i) _mm_prefetch(next + (11 * line + i) * 64, _MM_HINT_T0);
            for (int parity = 0; parity < 2; ++parity) {
                __m512i m[16];
                for (int i = 0; i < 16; ++i)
                    m[i] = _mm512_load_si512(expanded + (32 * line + 2 * i + parity) * kVectorBytes);
                transpose(m);
                for (int row = 0; row < kPanelRows; ++row)
                    _mm512_store_si512(turned[parity][row] + 16 * line, m[row]);
            }
        }
        for (int c = 0; c < kChains; ++c) append(chains_[c], turned[c / kInputs], c % kInputs, lines, panel);
    }

    // `input`: of a vector's.
    static void append(Chain& chain, const std::uint32_t (*turned)[kStripInputs], int input, int lines,
                       int panel) {
        const __m128i first = _mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
        std::size_t filled = chain.filled;
        for (int row = 0; row < kPanelRows; ++row) {
            const std::size_t before = filled;
            for (int line = 0; line < lines; ++line) {
                __m512i bits = _mm512_load_si512(turned[row] + 16 * line);
                if (kInputs == 2)
                    bits = input ? _mm512_and_si512(bits, _mm512_set1_epi32(std::int32_t(0xFFFF0000)))
                                 : _mm512_slli_epi32(bits, 16);
                const __mmask16 live = _mm512_test_epi32_mask(bits, bits);
                _mm512_storeu_si512(chain.values + filled, _mm512_maskz_compress_epi32(live, bits));
                const __m128i index = _mm_add_epi8(first, _mm_set1_epi8(char(16 * line)));
                _mm_storeu_si128(reinterpret_cast<__m128i*>(chain.index + filled),
                                 _mm_maskz_compress_epi8(live, index));
                filled += std::size_t(_mm_popcnt_u32(live));
            }
            chain.counts[panel * kPanelRows + row] = std::uint8_t(filled - before);
        }
        chain.filled = filled;
    }

    // Inputs [begin, begin + count) of 64 tokens, or as many as there are, to the tiles of their chains;
    // places without a token repeat the last one.
    void turn(const Activations& x, int origin, int begin, int count) {
        for (int k = 0; k < count; k += 16) {
            for (int t = 0; t < kTileTokens; t += 16) {
                __m512i m[16];
                for (int i = 0; i < 16; ++i) {
                    const int token = std::min(origin + t + i, x.num_tokens - 1);
                    m[i] = _mm512_loadu_si512(x.x + token * x.stride + begin + k);
                }
                transpose(m);
                for (int i = 0; i < 16; ++i) {
                    const int chain = i % kChains, input = (k + i) / kChains;
                    if (k + i < count) _mm512_store_si512(tiles_[chain] + input * kTileTokens + t, m[i]);
                }
            }
        }
    }

    // The outputs of a panel for `count` tokens from `token` of the tile on.
    static void write(const float (*sums)[kRows * kTileTokens], int panel, int token, int count, float* y_TN,
                      std::size_t stride) {
        __m512i m[16];
        for (int row = 0; row < kPanelRows; ++row) {
            const auto chain = [&](int c) {
                return _mm512_load_ps(sums[c] + (panel * kPanelRows + row) * kTileTokens + token);
            };
            __m512 sum = _mm512_add_ps(chain(0), chain(1));
            if constexpr (kChains == 4) sum = _mm512_add_ps(sum, _mm512_add_ps(chain(2), chain(3)));
            m[row] = _mm512_castps_si512(sum);
        }
        transpose(m);
        for (int t = 0; t < count; ++t) _mm512_storeu_si512(y_TN + t * stride + panel * kPanelRows, m[t]);
    }
};

}  // namespace gossamer::avx512
GOSSAMER_END
