// Code between GOSSAMER_BEGIN_<LEVEL> and GOSSAMER_END is compiled for that instruction set, whatever the
// rest of the build is for. It may only be reached through the table, after isa() has found that the machine
// has the instructions.
#pragma once

#include <immintrin.h>

#define GOSSAMER_AVX2 "avx2,fma,bmi,bmi2,popcnt"
#define GOSSAMER_AVX512 "avx512f,avx512dq,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni," GOSSAMER_AVX2
#define GOSSAMER_AVX512_BF16 "avx512bf16," GOSSAMER_AVX512
#define GOSSAMER_AMX "amx-tile,amx-int8,amx-bf16," GOSSAMER_AVX512_BF16

#define GOSSAMER_PRAGMA_TEXT(text) _Pragma(#text)
#define GOSSAMER_PRAGMA(text) GOSSAMER_PRAGMA_TEXT(text)
#if defined(__clang__)
#define GOSSAMER_BEGIN(level) \
    GOSSAMER_PRAGMA(clang attribute push(__attribute__((target(level))), apply_to = function))
#define GOSSAMER_END _Pragma("clang attribute pop")
#else
#define GOSSAMER_BEGIN(level) _Pragma("GCC push_options") GOSSAMER_PRAGMA(GCC target(level))
#define GOSSAMER_END _Pragma("GCC pop_options")
#endif
#define GOSSAMER_BEGIN_AVX2 GOSSAMER_BEGIN(GOSSAMER_AVX2)
#define GOSSAMER_BEGIN_AVX512 GOSSAMER_BEGIN(GOSSAMER_AVX512)
#define GOSSAMER_BEGIN_AVX512_BF16 GOSSAMER_BEGIN(GOSSAMER_AVX512_BF16)
#define GOSSAMER_BEGIN_AMX GOSSAMER_BEGIN(GOSSAMER_AMX)

GOSSAMER_BEGIN_AVX512
namespace gossamer::avx512 {

// The first `count` of 16 lanes; all if there are more.
inline __mmask16 first_lanes(int count) {
    return count >= 16 ? __mmask16(0xFFFF) : __mmask16((1u << count) - 1);
}

}  // namespace gossamer::avx512
GOSSAMER_END
