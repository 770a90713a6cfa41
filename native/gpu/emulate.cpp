// The kernels of src/gossamer/gpu/cuda as C functions that tests call: the same text, run by warp.hpp.
#include "activations.cuh"
#include "sparse_i8.cuh"

extern "C" {

// As the operator launches it: a warp for each share of each panel.
void emulate_sparse_i8(SparseI8 job, int tiles, unsigned seed, int eager_copies) {
    const int blocks = (job.panels * job.shares + kWarps - 1) / kWarps;
    emulation::launch(blocks, kWarps * kLanes, kSharedBytes, seed, eager_copies != 0, [=] {
        tiles == 1   ? sparse_i8_1(job)
        : tiles == 2 ? sparse_i8_2(job)
        : tiles == 4 ? sparse_i8_4(job)
                     : sparse_i8_8(job);
    });
}

void emulate_round_inputs(RoundInputs job, unsigned seed) {
    emulation::launch(job.tiles * 8, kTokenWarps * kLanes, kTokenWarps * 4, seed, false,
                      [=] { round_inputs(job); });
}

void emulate_scale_sums(ScaleSums job, unsigned seed) {
    const int blocks = static_cast<int>((static_cast<int64_t>(job.tokens) * job.outputs + 255) / 256);
    emulation::launch(blocks, 256, 0, seed, false, [=] { scale_sums(job); });
}
}
