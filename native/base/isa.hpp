// Which instructions this machine and its operating system allow.
#pragma once

#include <string_view>

namespace gossamer {

// Each level has everything of those below it.
//   avx2    AVX2, FMA, BMI 1 and 2, POPCNT
//   avx512  F, DQ, BW, VL, VBMI, VBMI2, VNNI
//   amx     tiles of int8 and of bfloat16, and the kernel's permission to use them
enum class Isa { scalar, avx2, avx512, amx };

// The best level of this machine, capped by GOSSAMER_ISA; ConfigError when that names no level. Decided once.
Isa isa();

Isa parse_isa(std::string_view name);
const char* name(Isa isa);

}  // namespace gossamer
