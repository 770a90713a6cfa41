// 16 x 16 words turned round, by AVX-512.
#pragma once

#include "kernels/x86/target.hpp"

GOSSAMER_BEGIN_AVX512
namespace gossamer::avx512 {

// Element (i, j) of 16 x 16 words becomes (j, i).
inline void transpose(__m512i* m) {
    __m512i a[16];
    for (int i = 0; i < 16; i += 2) {
        a[i] = _mm512_unpacklo_epi32(m[i], m[i + 1]);
        a[i + 1] = _mm512_unpackhi_epi32(m[i], m[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        m[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
        m[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
        m[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
        m[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0x88);
        a[i + 4] = _mm512_shuffle_i32x4(m[i], m[i + 4], 0xDD);
        a[i + 8] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0x88);
        a[i + 12] = _mm512_shuffle_i32x4(m[i + 8], m[i + 12], 0xDD);
    }
    for (int i = 0; i < 8; ++i) {
        m[i] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0x88);
        m[i + 8] = _mm512_shuffle_i32x4(a[i], a[i + 8], 0xDD);
    }
}

}  // namespace gossamer::avx512
GOSSAMER_END
