#include "base/isa.hpp"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "base/view.hpp"

namespace gossamer {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "amx"};
constexpr int kRequestPermission = 0x1023, kTileData = 18;  // arch_prctl(ARCH_REQ_XCOMP_PERM, XTILEDATA)

struct Registers {
    unsigned a = 0, b = 0, c = 0, d = 0;
};

Registers cpuid(unsigned leaf) {
    Registers found;
    if (!__get_cpuid_count(leaf, 0, &found.a, &found.b, &found.c, &found.d)) return {};
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

Isa best() {
    const Registers basic = cpuid(1), extended = cpuid(7);
    if (!all(basic.c, {12, 23, 27, 28})) return Isa::scalar;  // FMA, POPCNT, OSXSAVE, AVX
    const std::uint64_t states = enabled_states();
    const auto saves = [&](std::uint64_t mask) { return (states & mask) == mask; };
    if (!saves(0x6) || !all(extended.b, {3, 5, 8})) return Isa::scalar;  // BMI1, AVX2, BMI2
    const bool avx512 = all(extended.b, {16, 17, 30, 31}) && all(extended.c, {1, 6, 11});
    if (!saves(0xE6) || !avx512) return Isa::avx2;
    const bool amx = saves(0x60000) && all(extended.d, {22, 24, 25});  // BF16, TILE, INT8
    return amx && may_use_tiles() ? Isa::amx : Isa::avx512;
}

Isa decide() {
    const char* cap = std::getenv("GOSSAMER_ISA");
    return cap == nullptr || *cap == '\0' ? best() : std::min(best(), parse_isa(cap));
}

}  // namespace

Isa isa() {
    static const Isa decided = decide();
    return decided;
}

Isa parse_isa(std::string_view name) {
    for (int level = 0; level < 4; ++level) {
        if (name == kNames[level]) return Isa(level);
    }
    throw ConfigError("found instruction set '" + std::string(name) +
                      "' (GOSSAMER_ISA); expected scalar, avx2, avx512 or amx");
}

const char* name(Isa isa) { return kNames[int(isa)]; }

}  // namespace gossamer
