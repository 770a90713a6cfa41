#include "isa.hpp"

#include <cpuid.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "view.hpp"

namespace gossamer {
namespace {

constexpr bool has(unsigned word, int bit) { return (word >> bit) & 1; }

std::uint64_t enabled_states() {
    std::uint32_t low = 0, high = 0;
    __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return std::uint64_t(high) << 32 | low;
}

// AVX-512 F, DQ, BW, VL, VBMI, VBMI2, VNNI, with FMA and POPCNT, and registers that the operating system
// saves.
bool has_avx512() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return false;
    const bool fma = has(c, 12), popcnt = has(c, 23), osxsave = has(c, 27);
    if (!fma || !popcnt || !osxsave || (enabled_states() & 0xE6) != 0xE6) return false;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    return has(b, 16) && has(b, 17) && has(b, 30) && has(b, 31) && has(c, 1) && has(c, 6) && has(c, 11);
}

Isa decide() {
    const char* cap = std::getenv("GOSSAMER_ISA");
    return cap == nullptr || *cap == '\0' ? machine_isa() : std::min(machine_isa(), parse_isa(cap));
}

}  // namespace

Isa machine_isa() { return has_avx512() ? Isa::avx512 : Isa::scalar; }

Isa isa() {
    static const Isa decided = decide();
    return decided;
}

Isa parse_isa(std::string_view name) {
    if (name == "scalar") return Isa::scalar;
    if (name == "avx512") return Isa::avx512;
    throw ConfigError("found instruction set '" + std::string(name) +
                      "' (GOSSAMER_ISA); expected scalar or avx512");
}

const char* name(Isa isa) { return isa == Isa::avx512 ? "avx512" : "scalar"; }

}  // namespace gossamer
