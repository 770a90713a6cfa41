// The matrix unit (AMX): 8 tiles of 16 rows x 64 bytes, and products of whole tiles.
//
//   C [16 tokens][16 rows] += A [16 tokens][64 bytes of inputs] x B [16 vectors][64 bytes of weights]
//
// B is 16 weight vectors as they lie in a panel; A is 16 rows of activations; a product takes 16 cycles.
// `Hardware` issues the instructions; `Emulated` does what Intel's manual says they do, so that kernels on
// tiles can be tested on any machine. Tiles 0 to 3 are C (token block, panel), 4 and 5 are A, 6 and 7 are B.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>

#include "base/view.hpp"
#include "kernels/x86/target.hpp"

namespace gossamer::amx {

constexpr int kTileRows = 16, kTileBytes = 64;
constexpr int kVectorTokens = 4;  // up to which vectors straight from the file are as fast

class Emulated {
  public:
    // Tiles of `rows` tokens and `steps` of four bytes (a row of A, the rows of B). Zeroes them.
    void begin(int rows = kTileRows, int steps = kTileRows) {
        std::memset(tiles_, 0, sizeof tiles_);
        rows_ = rows;
        steps_ = steps;
    }
    void end() {}

    template <int kTile>
    void zero() {
        std::memset(tiles_[kTile], 0, sizeof tiles_[kTile]);
    }
    template <int kTile>
    void load(const void* rows, std::size_t stride) {
        const int bytes = kTile == 4 || kTile == 5 ? 4 * steps_ : kTileBytes;
        for (int i = 0; i < (kTile < 6 ? rows_ : steps_); ++i)
            std::memcpy(tiles_[kTile][i], static_cast<const char*>(rows) + i * stride, bytes);
    }
    template <int kTile>
    void store(void* rows, std::size_t stride) const {
        for (int i = 0; i < rows_; ++i)
            std::memcpy(static_cast<char*>(rows) + i * stride, tiles_[kTile][i], kTileBytes);
    }
    // C += A (unsigned bytes) x B (signed bytes), exact in int32.
    template <int kC, int kA, int kB>
    void multiply_int8() {
        for (int m = 0; m < rows_; ++m) {
            for (int n = 0; n < 16; ++n) {
                std::int32_t sum = get<std::int32_t>(kC, m, n);
                for (int k = 0; k < 4 * steps_; ++k)
                    sum += tiles_[kA][m][k] * std::int8_t(tiles_[kB][k / 4][4 * n + k % 4]);
                std::memcpy(&tiles_[kC][m][4 * n], &sum, sizeof sum);
            }
        }
    }
    // C += A (bfloat16) x B (bfloat16) in float32: even and odd inputs in a chain each, then added to C.
    template <int kC, int kA, int kB>
    void multiply_bf16() {
        const auto widen = [](std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t(bits) << 16); };
        for (int m = 0; m < rows_; ++m) {
            for (int n = 0; n < 16; ++n) {
                float chains[2] = {};
                for (int k = 0; k < 2 * steps_; ++k) {
                    const float a = widen(get<std::uint16_t>(kA, m, k));
                    const float b = widen(get<std::uint16_t>(kB, k / 2, 2 * n + k % 2));
                    chains[k % 2] = std::fma(a, b, chains[k % 2]);
                }
                const float sum = get<float>(kC, m, n) + (chains[0] + chains[1]);
                std::memcpy(&tiles_[kC][m][4 * n], &sum, sizeof sum);
            }
        }
    }

  private:
    template <class T>
    T get(int tile, int row, int index) const {
        T value;
        std::memcpy(&value, &tiles_[tile][row][index * sizeof(T)], sizeof value);
        return value;
    }
    int rows_ = kTileRows, steps_ = kTileRows;
    std::uint8_t tiles_[8][kTileRows][kTileBytes];
};

}  // namespace gossamer::amx

GOSSAMER_BEGIN_AMX
namespace gossamer::amx {

struct Hardware {
    // See Emulated.
    void begin(int rows = kTileRows, int steps = kTileRows) {
        struct alignas(64) {
            std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
            std::uint16_t bytes_per_row[16] = {};
            std::uint8_t rows[16] = {};
        } config;
        for (int tile = 0; tile < 8; ++tile) {
            config.bytes_per_row[tile] = tile == 4 || tile == 5 ? 4 * steps : kTileBytes;
            config.rows[tile] = tile < 6 ? rows : steps;
        }
        __asm__ volatile("" : : "r"(&config) : "memory");  // GCC 12 drops the stores above without it
        _tile_loadconfig(&config);
    }
    void end() { _tile_release(); }

    // GCC's intrinsics for tiles are macros that want literal numbers.
    template <int kTile>
    void zero() {
        __asm__ volatile("tilezero %%tmm%c0" : : "i"(kTile));
    }
    template <int kTile>
    void load(const void* rows, std::size_t stride) {
        __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
    }
    template <int kTile>
    void store(void* rows, std::size_t stride) const {
        __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(rows), "r"(stride), "i"(kTile) : "memory");
    }
    template <int kC, int kA, int kB>
    void multiply_int8() {
        __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
    }
    template <int kC, int kA, int kB>
    void multiply_bf16() {
        __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kC), "i"(kA), "i"(kB));
    }
};

}  // namespace gossamer::amx
GOSSAMER_END
