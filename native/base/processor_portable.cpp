#include "base/processor.hpp"

namespace gossamer {

Isa best_isa() { return Isa::scalar; }

void pause_spinning() {}

}  // namespace gossamer
