// Declarations of the rows that table.cpp lists. One file per family has their definitions.
#pragma once

#include "kernels/table.hpp"

namespace gossamer {

extern const MatmulRow kIntegerRows[16], kFloatRows[14];
extern const MatmulRow kEmulatedIntegerRows[4], kEmulatedFloatRows[2];

#define GOSSAMER_VECTOR(level)                                            \
    namespace level {                                                     \
    void rmsnorm(const float*, const float*, float, int, float*);         \
    void quantize(const float*, int, std::uint8_t*, float*);              \
    void split(const float*, int, std::uint16_t*, std::uint16_t*);        \
    void swiglu(const float*, const float*, int, float*);                 \
    void attention(const AttentionTask&);                                 \
    std::uint64_t read(const std::uint8_t*, std::size_t, std::size_t);    \
    }

GOSSAMER_VECTOR(scalar)
GOSSAMER_VECTOR(avx512)

}  // namespace gossamer
