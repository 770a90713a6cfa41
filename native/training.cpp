// What training calls in place on torch's own memory. Threads are shared by all calls.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>

#include "isa.hpp"
#include "kernels/table.hpp"
#include "python.hpp"
#include "threads.hpp"

namespace gossamer {

using namespace nb::literals;

namespace {

using FloatsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

constexpr int kPiece = 16 * 1024;  // elements of an update that are worth a thread

// Runs task(thread, num_threads) on a pool that outlives the call: a model has hundreds a step.
template <class Task>
void run_shared(int num_threads, Task&& task) {
    static std::mutex mutex;
    static std::unique_ptr<ThreadPool> pool;
    static pid_t owner = 0;
    num_threads = std::clamp(num_threads, 1, 1024);
    if (num_threads == 1) return task(0, 1);
    const std::lock_guard<std::mutex> lock(mutex);
    if (owner != getpid()) {
        [[maybe_unused]] const ThreadPool* parents =
            pool.release();  // a fork has its object, not its threads
        owner = getpid();
    }
    if (pool == nullptr || pool->size() != num_threads) pool = std::make_unique<ThreadPool>(num_threads);
    pool->run([&](int thread) { task(thread, num_threads); });
}

void adamw(FloatsOut values, Floats gradient, FloatsOut exp_avg, FloatsOut exp_avg_sq, double learning_rate,
           double beta1, double beta2, double eps, double weight_decay, double step, int num_threads,
           const std::optional<std::string>& level) {
    const std::size_t count = values.size();
    if (gradient.size() != count || exp_avg.size() != count || exp_avg_sq.size() != count)
        throw EngineError("gradient and moments must be as long as the values");
    const AdamwStep factors{.take1 = float(1 - beta1),
                            .keep2 = float(beta2),
                            .take2 = float(1 - beta2),
                            .shrink = float(1 - learning_rate * weight_decay),
                            .rate = float(learning_rate / (1 - std::pow(beta1, step))),
                            .correction2 = float(std::sqrt(1 - std::pow(beta2, step))),
                            .eps = float(eps)};
    const AdamwRow& row = find_adamw(level ? runnable(*level) : isa());
    const int pieces = int((count + kPiece - 1) / kPiece);
    nb::gil_scoped_release unlocked;
    run_shared(pieces > 1 ? num_threads : 1, [&](int thread, int threads) {
        const Part part(pieces, thread, threads);
        const std::size_t begin = std::size_t(part.begin) * kPiece;
        const std::size_t end = std::min(count, std::size_t(part.end) * kPiece);
        row.adamw(factors, gradient.data() + begin, end - begin, exp_avg.data() + begin,
                  exp_avg_sq.data() + begin, values.data() + begin);
    });
}

}  // namespace

void bind_training(nb::module_& m) {
    m.def("adamw", &adamw, "values"_a.noconvert(), "gradient"_a.noconvert(), "exp_avg"_a.noconvert(),
          "exp_avg_sq"_a.noconvert(), nb::kw_only(), "learning_rate"_a, "beta1"_a, "beta2"_a, "eps"_a,
          "weight_decay"_a, "step"_a, "num_threads"_a, "isa"_a = nb::none());
}

}  // namespace gossamer
