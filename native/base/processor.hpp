// What depends on the kind of processor and is no kernel. CMake chooses processor_<kind>.cpp:
// processor_x86.cpp, or processor_portable.cpp for a kind that has no file of its own yet.
#pragma once

#include "base/isa.hpp"

namespace gossamer {

// The best level that this machine and its operating system allow.
Isa best_isa();

// Called in every turn of a loop that waits for another thread: lets that thread have the core's resources.
void pause_spinning();

}  // namespace gossamer
