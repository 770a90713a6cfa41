// The sweep of SparseGPT and GPTQ: see ../sweep.hpp.

#include "kernels/sweep.hpp"

#include "kernels/kernels.hpp"

namespace gossamer {
namespace scalar {

void sweep(const SweepTask& task, int begin, int end, float* scratch) {
    sweep::sweep(task, begin, end, scratch);
}

}  // namespace scalar
}  // namespace gossamer
