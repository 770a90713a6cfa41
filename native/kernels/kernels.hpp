// Declarations of the rows that table.cpp lists. One file per family has their definitions.
#pragma once

#include "kernels/table.hpp"

namespace gossamer {

#define GOSSAMER_MATMUL(level, family)                                                      \
    namespace level {                                                                       \
    void matmul_##family(const Linear&, int, int, const Activations&, float*, std::size_t); \
    }
#define GOSSAMER_ACCUMULATE(level, family)                                                             \
    namespace level {                                                                                  \
    void accumulate_##family(const Linear&, int, int, const Activations&, std::int32_t*, std::size_t); \
    }
#define GOSSAMER_VECTOR(level)                                            \
    namespace level {                                                     \
    void rmsnorm(const float*, const float*, float, int, float*);         \
    void quantize(const float*, int, std::uint8_t*, std::size_t, float*); \
    void swiglu(const float*, const float*, int, float*);                 \
    void rope(float*, int, int, const float*);                            \
    std::uint64_t read(const std::uint8_t*, std::size_t, std::size_t);    \
    }
#define GOSSAMER_ATTENTION(level)              \
    namespace level {                          \
    void attention_f32(const AttentionTask&);  \
    void attention_bf16(const AttentionTask&); \
    void attention_i8(const AttentionTask&);   \
    }

GOSSAMER_MATMUL(scalar, dense_f32)
GOSSAMER_MATMUL(scalar, dense_bf16)
GOSSAMER_MATMUL(scalar, dense_i8)
GOSSAMER_MATMUL(scalar, sparse_i8)
GOSSAMER_MATMUL(avx512, dense_f32)
GOSSAMER_MATMUL(avx512, dense_bf16)
GOSSAMER_MATMUL(avx512, dense_i8)
GOSSAMER_MATMUL(avx512, sparse_i8)
GOSSAMER_ACCUMULATE(scalar, dense_i8)
GOSSAMER_ACCUMULATE(scalar, sparse_i8)
GOSSAMER_ACCUMULATE(avx512, dense_i8)
GOSSAMER_ACCUMULATE(avx512, sparse_i8)
GOSSAMER_VECTOR(scalar)
GOSSAMER_VECTOR(avx512)
GOSSAMER_ATTENTION(scalar)
GOSSAMER_ATTENTION(avx512)

}  // namespace gossamer
