#include <cpuid.h>
#include <emmintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "base/processor.hpp"

namespace gossamer {
namespace {

constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf, unsigned subleaf = 0) {
    Registers found;
    if (!__get_cpuid_count(leaf, subleaf, &found.a, &found.b, &found.c, &found.d)) return {};
    return found;
}

bool all(unsigned word, std::initializer_list<int> bits) {
    return std::all_of(bits.begin(), bits.end(), [&](int bit) { return (word >> bit) & 1; });
}

// Register files that the operating system saves.
std::uint64_t enabled_states() {
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return std::uint64_t(high) << 32 | low;
}

bool may_use_tiles() { return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0; }

}  // namespace

Isa best_isa() {
    const Registers basic = cpuid(1), extended = cpuid(7);
    if (!all(basic.c, {12, 23, 27, 28})) return Isa::scalar;  // FMA, POPCNT, OSXSAVE, AVX
    const std::uint64_t states = enabled_states();
    const auto saves = [&](std::uint64_t mask) { return (states & mask) == mask; };
    if (!saves(0x6) || !all(extended.b, {3, 5, 8})) return Isa::scalar;  // BMI1, AVX2, BMI2
    const bool avx512 = all(extended.b, {16, 17, 30, 31}) && all(extended.c, {1, 6, 11});
    if (!saves(0xE6) || !avx512) return Isa::avx2;
    const bool amx = saves(0x60000) && all(extended.d, {22, 24, 25});  // BF16, TILE, INT8
    const bool bf16 = all(cpuid(7, 1).a, {5});
    if (bf16 && amx && may_use_tiles()) return Isa::amx;
    return bf16 ? Isa::avx512_bf16 : Isa::avx512;
}

void pause_spinning() { _mm_pause(); }

}  // namespace gossamer
