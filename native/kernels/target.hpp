// Regions compiled for more than the baseline (-march=x86-64). Include every header before a region begins:
// code in it may only be reached through the table, after isa() has found the instructions.
#pragma once

#include <immintrin.h>

#define GOSSAMER_AVX512 \
    "avx512f,avx512dq,avx512bw,avx512vl,avx512vbmi,avx512vbmi2,avx512vnni,avx2,fma,bmi,bmi2,popcnt"

#define GOSSAMER_PRAGMA_TEXT(text) _Pragma(#text)
#define GOSSAMER_PRAGMA(text) GOSSAMER_PRAGMA_TEXT(text)
#if defined(__clang__)
#define GOSSAMER_BEGIN_AVX512 \
    GOSSAMER_PRAGMA(clang attribute push(__attribute__((target(GOSSAMER_AVX512))), apply_to = function))
#define GOSSAMER_END _Pragma("clang attribute pop")
#else
#define GOSSAMER_BEGIN_AVX512 _Pragma("GCC push_options") GOSSAMER_PRAGMA(GCC target(GOSSAMER_AVX512))
#define GOSSAMER_END _Pragma("GCC pop_options")
#endif
