// Which instructions this machine and its operating system allow.
#pragma once

#include <string_view>

namespace gossamer {

enum class Isa { scalar, avx512 };

// The best level of this machine, capped by GOSSAMER_ISA; ConfigError when that names no level. Decided once.
Isa isa();

// The best level of this machine, whatever GOSSAMER_ISA says.
Isa machine_isa();

Isa parse_isa(std::string_view name);
const char* name(Isa isa);

}  // namespace gossamer
