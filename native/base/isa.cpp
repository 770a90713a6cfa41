#include "base/isa.hpp"

#include <cstdlib>
#include <string>

#include "base/processor.hpp"
#include "base/view.hpp"

namespace gossamer {
namespace {

struct Level {
    const char* name;
    Isa builds_on;
    bool emulated = false;
};

// In the order of Isa.
constexpr Level kLevels[kNumIsas] = {
    {"scalar", Isa::scalar},
    {"avx2", Isa::scalar},
    {"avx512", Isa::avx2},
    {"amx", Isa::avx512},
    {"amx-emulated", Isa::avx512, true},
};

constexpr const Level& level_of(Isa level) { return kLevels[int(level)]; }

[[noreturn]] void refuse(std::string_view name) {
    std::string expected;
    for (const Level& level : kLevels) {
        if (!level.emulated) expected += (expected.empty() ? "" : ", ") + std::string(level.name);
    }
    throw ConfigError("found instruction set '" + std::string(name) + "' (GOSSAMER_ISA); expected one of " +
                      expected);
}

// Whether `level` is `other`, or builds on it.
bool includes(Isa level, Isa other) {
    while (level != other && level != Isa::scalar) level = builds_on(level);
    return level == other;
}

Isa decide() {
    Isa level = best_isa();
    const char* name = std::getenv("GOSSAMER_ISA");
    if (name == nullptr || *name == '\0') return level;
    const Isa cap = parse_isa(name);
    if (level_of(cap).emulated) refuse(name);
    while (!includes(cap, level)) level = builds_on(level);
    return level;
}

}  // namespace

Isa isa() {
    static const Isa decided = decide();
    return decided;
}

bool runs(Isa level) { return includes(isa(), level_of(level).emulated ? builds_on(level) : level); }

Isa builds_on(Isa level) { return level_of(level).builds_on; }

Isa parse_isa(std::string_view name) {
    for (int i = 0; i < kNumIsas; ++i) {
        if (name == kLevels[i].name) return Isa(i);
    }
    refuse(name);
}

const char* name(Isa level) { return level_of(level).name; }

}  // namespace gossamer
