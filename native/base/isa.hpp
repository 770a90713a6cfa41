// Levels of instructions: which kernels a machine can run.
//
// A level names the one that it builds on and has everything of it, and of that one's, down to scalar, which
// every machine runs. Levels of different processors share only scalar: there is no total order.
//
//   scalar        plain C++
//   avx2          on scalar: AVX2, FMA, BMI 1 and 2, POPCNT
//   avx512        on avx2: F, DQ, BW, VL, VBMI, VBMI2, VNNI
//   avx512-bf16   on avx512: BF16. It rounds the inputs of bfloat16 weights, and is chosen only where
//                 GOSSAMER_ISA names it.
//   amx           on avx512-bf16: tiles of int8 and of bfloat16, and the system's permission to use them
//   amx-emulated  on avx512: the kernels of amx with their tiles computed by plain C++. It is never chosen,
//                 and serves tests on machines without tiles.
#pragma once

#include <string_view>

namespace gossamer {

enum class Isa { scalar, avx2, avx512, avx512_bf16, amx, amx_emulated };
constexpr int kNumIsas = 6;

// The level in use: the best of this machine, capped by GOSSAMER_ISA: the best one that the machine's level
// and the cap have in common, of those that need not be named. It is decided once; ConfigError when
// GOSSAMER_ISA names no level.
Isa isa();

// Whether this machine, capped by GOSSAMER_ISA, runs the kernels of a level.
bool runs(Isa level);

// The level that `level` builds on; scalar builds on itself.
Isa builds_on(Isa level);

// The level of that name; ConfigError when there is none.
Isa parse_isa(std::string_view name);
const char* name(Isa level);

}  // namespace gossamer
