// What this machine can do at best: see ../scalar/probes.cpp.
//
// int8 is multiplied by `vpmaddwd` on 16-bit words (avx2), `vpdpbusd` (avx512) or `tdpbusd` (amx), float32 by
// fused multiply-adds.

#include "kernels/kernels.hpp"
#include "kernels/x86/target.hpp"
#include "kernels/x86/tiles.hpp"

namespace gossamer {

GOSSAMER_BEGIN_AVX2
namespace avx2 {

std::uint64_t multiply_int8(std::uint64_t rounds) {
    __m256i chains[8] = {}, weights = _mm256_set1_epi16(3), inputs = _mm256_set1_epi16(5);
    for (std::uint64_t i = 0; i < rounds; ++i) {
        for (__m256i& chain : chains) {
            __asm__ volatile("" : "+x"(weights), "+x"(inputs));
            chain = _mm256_add_epi32(chain, _mm256_madd_epi16(weights, inputs));
        }
    }
    for (__m256i& chain : chains) __asm__ volatile("" : : "x"(chain));
    return rounds * 8 * 16;
}

std::uint64_t multiply_f32(std::uint64_t rounds) {
    __m256 chains[12] = {};
    const __m256 weights = _mm256_set1_ps(0.5f), inputs = _mm256_set1_ps(0.25f);
    for (std::uint64_t i = 0; i < rounds; ++i) {
        for (__m256& chain : chains) {
            chain = _mm256_fmadd_ps(inputs, weights, chain);
            __asm__ volatile("" : "+x"(chain));
        }
    }
    return rounds * 12 * 8;
}

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {

std::uint64_t read(const std::uint8_t* data, std::size_t count, std::size_t prefetch_bytes) {
    __m512i sums[4] = {};
    for (std::size_t i = 0; i + 4 * kVectorBytes <= count; i += 4 * kVectorBytes) {
        for (int j = 0; j < 4; ++j) {
            const std::uint8_t* line = data + i + std::size_t(j) * kVectorBytes;
            if (prefetch_bytes != 0)
                _mm_prefetch(reinterpret_cast<const char*>(line + prefetch_bytes), _MM_HINT_T0);
            sums[j] = _mm512_add_epi64(sums[j], _mm512_loadu_si512(line));
        }
    }
    const __m512i low = _mm512_add_epi64(sums[0], sums[1]), high = _mm512_add_epi64(sums[2], sums[3]);
    return std::uint64_t(_mm512_reduce_add_epi64(_mm512_add_epi64(low, high)));
}

std::uint64_t multiply_int8(std::uint64_t rounds) {
    __m512i chains[16] = {};
    const __m512i weights = _mm512_set1_epi8(3), inputs = _mm512_set1_epi8(5);
    for (std::uint64_t i = 0; i < rounds; ++i) {
        for (__m512i& chain : chains) {
            chain = _mm512_dpbusd_epi32(chain, inputs, weights);
            __asm__ volatile("" : "+v"(chain));
        }
    }
    return rounds * 16 * 64;
}

std::uint64_t multiply_f32(std::uint64_t rounds) {
    __m512 chains[16] = {};
    const __m512 weights = _mm512_set1_ps(0.5f), inputs = _mm512_set1_ps(0.25f);
    for (std::uint64_t i = 0; i < rounds; ++i) {
        for (__m512& chain : chains) {
            chain = _mm512_fmadd_ps(inputs, weights, chain);
            __asm__ volatile("" : "+v"(chain));
        }
    }
    return rounds * 16 * 16;
}

}  // namespace avx512
GOSSAMER_END

GOSSAMER_BEGIN_AMX
namespace amx {

std::uint64_t multiply_int8(std::uint64_t rounds) {
    Hardware tiles;
    tiles.begin();
    for (std::uint64_t i = 0; i < rounds; ++i) {
        tiles.multiply_int8<0, 4, 6>();
        tiles.multiply_int8<1, 4, 7>();
        tiles.multiply_int8<2, 5, 6>();
        tiles.multiply_int8<3, 5, 7>();
    }
    tiles.end();
    return rounds * 4 * 16 * 16 * 64;
}

}  // namespace amx
GOSSAMER_END

}  // namespace gossamer
