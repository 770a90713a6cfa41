// The sweep of SparseGPT and GPTQ by vectors: ../sweep.hpp, whose loops over the lanes of a strip the
// compiler turns into vectors of each level.

#include "kernels/sweep.hpp"

#include "kernels/kernels.hpp"
#include "kernels/x86/target.hpp"

namespace gossamer {

GOSSAMER_BEGIN_AVX2
namespace avx2 {

void sweep(const SweepTask& task, int begin, int end, float* scratch) {
    sweep::sweep(task, begin, end, scratch);
}

}  // namespace avx2
GOSSAMER_END

GOSSAMER_BEGIN_AVX512
namespace avx512 {

void sweep(const SweepTask& task, int begin, int end, float* scratch) {
    sweep::sweep(task, begin, end, scratch);
}

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
