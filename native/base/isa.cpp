#include "base/isa.hpp"

#include <cstdlib>
#include <string>

#include "base/processor.hpp"
#include "base/view.hpp"

namespace gossamer {
namespace {

// When a level is used: where the machine has it, where GOSSAMER_ISA names it besides, or in tests alone.
enum class Use { always, by_name, emulated };

struct Level {
    const char* name;
    Isa builds_on;
    Use use = Use::always;
};

// In the order of Isa.
constexpr Level kLevels[kNumIsas] = {
    {"scalar", Isa::scalar},
    {"avx2", Isa::scalar},
    {"avx512", Isa::avx2},
    {"avx512-bf16", Isa::avx512, Use::by_name},  // its rounding is for whoever runs it to accept
    {"amx", Isa::avx512_bf16},
    {"amx-emulated", Isa::avx512, Use::emulated},
};

constexpr const Level& level_of(Isa level) { return kLevels[int(level)]; }
constexpr bool emulated(const Level& level) { return level.use == Use::emulated; }

[[noreturn]] void refuse(std::string_view name) {
    std::string expected;
    for (const Level& level : kLevels) {
        if (!emulated(level)) expected += (expected.empty() ? "" : ", ") + std::string(level.name);
    }
    throw ConfigError("found instruction set '" + std::string(name) + "' (GOSSAMER_ISA); expected one of " +
                      expected);
}

// Whether `level` is `other`, or builds on it.
bool includes(Isa level, Isa other) {
    while (level != other && level != Isa::scalar) level = builds_on(level);
    return level == other;
}

struct Decided {
    Isa reached, used;  // the best level under the cap, and the one in use
};

Decided decide() {
    Isa level = best_isa();
    const char* name = std::getenv("GOSSAMER_ISA");
    const bool capped = name != nullptr && *name != '\0';
    const Isa cap = capped ? parse_isa(name) : level;
    if (emulated(level_of(cap))) refuse(name);
    while (!includes(cap, level)) level = builds_on(level);
    const bool chosen = level_of(level).use == Use::always || (capped && cap == level);
    return {level, chosen ? level : builds_on(level)};
}

const Decided& decided() {
    static const Decided once = decide();
    return once;
}

}  // namespace

Isa isa() { return decided().used; }

bool runs(Isa level) {
    return includes(decided().reached, emulated(level_of(level)) ? builds_on(level) : level);
}

Isa builds_on(Isa level) { return level_of(level).builds_on; }

Isa parse_isa(std::string_view name) {
    for (int i = 0; i < kNumIsas; ++i) {
        if (name == kLevels[i].name) return Isa(i);
    }
    refuse(name);
}

const char* name(Isa level) { return level_of(level).name; }

}  // namespace gossamer
