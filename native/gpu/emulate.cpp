// CUDA's driver on a CPU, for tests: what src/gossamer/gpu/driver.py asks of it, with the kernels of
// src/gossamer/gpu/cuda, the same text, run by warp.hpp.
#include "activations.cuh"
#include "expand.cuh"
#include "sparse_product.cuh"

namespace {

constexpr int kInvalidValue = 1, kInvalidImage = 200, kNotFound = 500;  // CUresult
constexpr int kMaxDynamicSharedBytes = 8;                               // CUfunction_attribute

struct Function {
    const char* name;
    std::function<void()> (*bind)(const void* job);
    int most_shared_bytes;  // that a block may be given; it takes asking for more
};

template <class Job, void (*kKernel)(Job)>
std::function<void()> bound(const void* job) {
    return [own = *static_cast<const Job*>(job)] { kKernel(own); };
}

Function functions[] = {
#define GOSSAMER_FUNCTION(Job, kernel) {#kernel, bound<Job, kernel>, 48 << 10}
    GOSSAMER_FUNCTION(RoundInputs, round_inputs),    GOSSAMER_FUNCTION(OrderInputs, order_inputs),
    GOSSAMER_FUNCTION(ScaleSums, scale_sums),        GOSSAMER_FUNCTION(Expand, expand_i8),
    GOSSAMER_FUNCTION(Expand, expand_bf16),          GOSSAMER_FUNCTION(SparseProduct, sparse_i8_1),
    GOSSAMER_FUNCTION(SparseProduct, sparse_i8_2),   GOSSAMER_FUNCTION(SparseProduct, sparse_i8_4),
    GOSSAMER_FUNCTION(SparseProduct, sparse_i8_8),   GOSSAMER_FUNCTION(SparseProduct, sparse_bf16_1),
    GOSSAMER_FUNCTION(SparseProduct, sparse_bf16_2), GOSSAMER_FUNCTION(SparseProduct, sparse_bf16_4),
    GOSSAMER_FUNCTION(SparseProduct, sparse_bf16_8), GOSSAMER_FUNCTION(Expand, expand_i4),
    GOSSAMER_FUNCTION(SparseProduct, sparse_i4_1),   GOSSAMER_FUNCTION(SparseProduct, sparse_i4_2),
    GOSSAMER_FUNCTION(SparseProduct, sparse_i4_4),   GOSSAMER_FUNCTION(SparseProduct, sparse_i4_8),
#undef GOSSAMER_FUNCTION
};

unsigned the_seed = 0;
bool copies_are_eager = false;

}  // namespace

extern "C" {

// Of the launches that follow: seed 0 gives lanes their turns in order; copies arrive late, or at once.
void emulate_with(unsigned seed, int eager_copies) {
    the_seed = seed;
    copies_are_eager = eager_copies != 0;
}

int cuModuleLoadData(void** module, const void* image) {
    if (std::memcmp(image, "\177ELF", 4) != 0) return kInvalidImage;
    *module = functions;
    return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    for (Function& it : functions) {
        if (module == functions && std::strcmp(name, it.name) == 0) {
            *function = &it;
            return 0;
        }
    }
    return kNotFound;
}

int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != kMaxDynamicSharedBytes || value > static_cast<int>(emulation::kSharedBytes))
        return kInvalidValue;
    static_cast<Function*>(function)->most_shared_bytes = value;
    return 0;
}

int cuLaunchKernel(void* function, unsigned blocks, unsigned blocks_y, unsigned blocks_z, unsigned threads,
                   unsigned threads_y, unsigned threads_z, unsigned shared_bytes, void* /*stream*/,
                   void** arguments, void** extra) {
    const Function& it = *static_cast<Function*>(function);
    const bool is_row = blocks_y == 1 && blocks_z == 1 && threads_y == 1 && threads_z == 1;
    if (blocks == 0 || threads == 0 || threads > 1024 || !is_row || extra != nullptr ||
        shared_bytes > static_cast<unsigned>(it.most_shared_bytes))
        return kInvalidValue;
    emulation::launch(static_cast<int>(blocks), static_cast<int>(threads), shared_bytes, the_seed,
                      copies_are_eager, it.bind(arguments[0]));
    return 0;
}

int cuGetErrorName(int code, const char** name) {
    *name = code == kInvalidValue   ? "CUDA_ERROR_INVALID_VALUE"
            : code == kInvalidImage ? "CUDA_ERROR_INVALID_IMAGE"
                                    : "CUDA_ERROR_NOT_FOUND";
    return 0;
}
}
