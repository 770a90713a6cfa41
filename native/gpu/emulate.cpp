// CUDA's driver on a CPU, for tests: what src/gossamer/gpu/driver.py asks of it, with the kernels of
// src/gossamer/gpu/cuda, the same text, run by warp.hpp.
#include "activations.cuh"
#include "expand.cuh"
#include "sparse_product.cuh"

namespace {

constexpr int kInvalidValue = 1, kInvalidDevice = 101, kInvalidImage = 200, kInvalidContext = 201,
              kInvalidHandle = 400, kNotFound = 500;  // CUresult
constexpr int kMaxDynamicSharedBytes = 8;             // CUfunction_attribute

struct Function {
    const char* name;
    std::function<void()> (*bind)(const void* job);
    int most_shared_bytes;  // that a block may be given; it takes asking for more
};

template <class Job, void (*kKernel)(Job)>
std::function<void()> bound(const void* job) {
    return [own = *static_cast<const Job*>(job)] { kKernel(own); };
}

const std::vector<Function> kFunctions = {
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

// Of a device, where one module lies, whose functions can be launched where this context is current.
struct Context {
    std::vector<Function> functions = kFunctions;
};

Context contexts[2];
thread_local Context* current = nullptr;

int the_version = 13000;
unsigned the_seed = 0;
bool copies_are_eager = false;

}  // namespace

extern "C" {

// Of the launches that follow: seed 0 gives lanes their turns in order; copies arrive late, or at once.
void emulate_with(unsigned seed, int eager_copies) {
    the_seed = seed;
    copies_are_eager = eager_copies != 0;
}

// Of CUDA, 1000 x major + 10 x minor, for what asks from now on.
void emulate_version(int version) { the_version = version; }

int cuDriverGetVersion(int* version) {
    *version = the_version;
    return 0;
}

int cuDeviceGet(int* device, int index) {
    if (index < 0 || index >= static_cast<int>(std::size(contexts))) return kInvalidDevice;
    *device = index;
    return 0;
}

int cuDevicePrimaryCtxRetain(void** context, int device) {
    *context = &contexts[device];
    return 0;
}

int cuCtxGetDevice(int* device) {
    if (current == nullptr) return kInvalidContext;
    *device = static_cast<int>(current - contexts);
    return 0;
}

int cuCtxSetCurrent(void* context) {
    current = static_cast<Context*>(context);
    return 0;
}

int cuModuleLoadData(void** module, const void* image) {
    if (current == nullptr) return kInvalidContext;
    if (std::memcmp(image, "\177ELF", 4) != 0) return kInvalidImage;
    *module = current;
    return 0;
}

int cuModuleGetFunction(void** function, void* module, const char* name) {
    for (Function& it : static_cast<Context*>(module)->functions) {
        if (std::strcmp(name, it.name) == 0) {
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
    if (current == nullptr) return kInvalidContext;
    const Function& it = *static_cast<Function*>(function);
    if (&it < &current->functions.front() || &it > &current->functions.back()) return kInvalidHandle;
    const bool is_row = blocks_y == 1 && blocks_z == 1 && threads_y == 1 && threads_z == 1;
    if (blocks == 0 || threads == 0 || threads > 1024 || !is_row || extra != nullptr ||
        shared_bytes > static_cast<unsigned>(it.most_shared_bytes))
        return kInvalidValue;
    emulation::launch(static_cast<int>(blocks), static_cast<int>(threads), shared_bytes, the_seed,
                      copies_are_eager, it.bind(arguments[0]));
    return 0;
}

int cuGetErrorName(int code, const char** name) {
    *name = code == kInvalidValue     ? "CUDA_ERROR_INVALID_VALUE"
            : code == kInvalidDevice  ? "CUDA_ERROR_INVALID_DEVICE"
            : code == kInvalidImage   ? "CUDA_ERROR_INVALID_IMAGE"
            : code == kInvalidContext ? "CUDA_ERROR_INVALID_CONTEXT"
            : code == kInvalidHandle  ? "CUDA_ERROR_INVALID_HANDLE"
                                      : "CUDA_ERROR_NOT_FOUND";
    return 0;
}
}
