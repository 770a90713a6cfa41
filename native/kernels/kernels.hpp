// Declarations of the rows that table.cpp lists. One file per family has their definitions.
#pragma once

#include "kernels/table.hpp"

namespace gossamer {

extern const MatmulRow kIntegerRows[16], kFloatRows[14];
extern const AttentionRow kTileAttention, kEmulatedTileAttention;
extern const MatmulRow kEmulatedIntegerRows[4], kEmulatedFloatRows[2];

#define GOSSAMER_VECTOR(level)                                     \
    namespace level {                                              \
    float rmsnorm(const float*, const float*, float, int, float*); \
    float swiglu(const float*, const float*, int, float*);         \
    float largest(const float*, int);                              \
    float quantize(const float*, int, float, std::uint8_t*);       \
    void split(const float*, int, std::uint16_t*, std::uint16_t*); \
    void rope(float*, int, int, const float*);                     \
    }
#define GOSSAMER_ATTENTION(level)              \
    namespace level {                          \
    void attention_f32(const AttentionTask&);  \
    void attention_bf16(const AttentionTask&); \
    void attention_i8(const AttentionTask&);   \
    }

#define GOSSAMER_SAMPLING(level)                                  \
    namespace level {                                             \
    float highest(const float*, int);                             \
    std::uint64_t mass(const float*, int, const Softmax&, float); \
    int keep(const float*, int, float, float, float*);            \
    }

#define GOSSAMER_ADAMW(level)                                                        \
    namespace level {                                                                \
    void adamw(const AdamwStep&, const float*, std::size_t, float*, float*, float*); \
    }

#define GOSSAMER_TRAINING(level)                                    \
    namespace level {                                               \
    void multiply(const Strip&, const float*, float*);              \
    void project(const Strip&, const float*, const float*, float*); \
    }

#define GOSSAMER_READ(level)                                           \
    namespace level {                                                  \
    std::uint64_t read(const std::uint8_t*, std::size_t, std::size_t); \
    }
#define GOSSAMER_MULTIPLY(level)                \
    namespace level {                           \
    std::uint64_t multiply_int8(std::uint64_t); \
    }
#define GOSSAMER_MULTIPLY_F32(level)           \
    namespace level {                          \
    std::uint64_t multiply_f32(std::uint64_t); \
    }

GOSSAMER_READ(scalar)
GOSSAMER_READ(avx512)
GOSSAMER_MULTIPLY(scalar)
GOSSAMER_MULTIPLY(avx2)
GOSSAMER_MULTIPLY(avx512)
GOSSAMER_MULTIPLY(amx)
GOSSAMER_MULTIPLY_F32(scalar)
GOSSAMER_MULTIPLY_F32(avx2)
GOSSAMER_MULTIPLY_F32(avx512)
GOSSAMER_VECTOR(scalar)
GOSSAMER_VECTOR(avx512)
GOSSAMER_ATTENTION(scalar)
GOSSAMER_ATTENTION(avx2)
GOSSAMER_ATTENTION(avx512)
GOSSAMER_SAMPLING(scalar)
GOSSAMER_SAMPLING(avx2)
GOSSAMER_SAMPLING(avx512)
GOSSAMER_ADAMW(scalar)
GOSSAMER_ADAMW(avx2)
GOSSAMER_ADAMW(avx512)
GOSSAMER_TRAINING(scalar)
GOSSAMER_TRAINING(avx2)
GOSSAMER_TRAINING(avx512)

}  // namespace gossamer
