// What becomes of the sums over unsigned activations u = q + 128 of a panel's 16 rows, by AVX-512: see
// ../scalar/integers.cpp.
#pragma once

#include "base/view.hpp"
#include "kernels/x86/target.hpp"

GOSSAMER_BEGIN_AVX512
namespace gossamer::avx512 {

// The sums over the signed q.
inline __m512i signed_sums(const Linear& w, int panel, __m512i sums) {
    const __m512i row_sums = _mm512_loadu_si512(w.sum + panel * kPanelRows);
    return _mm512_sub_epi32(sums, _mm512_slli_epi32(row_sums, 7));
}

// Writes outputs y.
struct OutputSink {
    const Linear& w;
    const Activations& x;
    float* y_TN;
    std::size_t stride;

    void operator()(int panel, int token, __m512i sums) const {
        const __m512 row_scales = _mm512_loadu_ps(w.scale + panel * kPanelRows);
        const __m512 scales = _mm512_mul_ps(_mm512_set1_ps(x.scale[token]), row_scales);
        const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(signed_sums(w, panel, sums)), scales);
        _mm512_storeu_ps(y_TN + token * stride + panel * kPanelRows, y);
    }
};

// Writes the exact integers.
struct SumSink {
    const Linear& w;
    std::int32_t* acc_TN;
    std::size_t stride;

    void operator()(int panel, int token, __m512i sums) const {
        _mm512_storeu_si512(acc_TN + token * stride + panel * kPanelRows, signed_sums(w, panel, sums));
    }
};

}  // namespace gossamer::avx512
GOSSAMER_END
