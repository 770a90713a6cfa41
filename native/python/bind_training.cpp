// What training calls on torch's own memory. Threads and scratch are shared by all calls.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/unique_ptr.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <bit>
#include <cmath>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "base/isa.hpp"
#include "python/arrays.hpp"
#include "training/head_loss.hpp"
#include "training/sparse_plan.hpp"

namespace gossamer {

using namespace nb::literals;

namespace {

using Mask = nb::ndarray<const bool, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatsOut = nb::ndarray<float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatMatrixOut = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using StridedMatrix = nb::ndarray<const float, nb::ndim<2>, nb::device::cpu>;
using Logits = nb::ndarray<nb::ndim<2>, nb::c_contig, nb::device::cpu>;  // float32, or bits of bfloat16
using LongIds = nb::ndarray<const std::int64_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using LongIdMatrix = nb::ndarray<const std::int64_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Level = std::optional<std::string>;

std::mutex turn;  // one call at a time has the workspace

// Threads and scratch that outlive the call.
Workspace& shared_workspace(int num_threads) {
    static std::unique_ptr<Workspace> workspace;
    static pid_t owner = 0;
    if (owner != getpid()) {
        [[maybe_unused]] const Workspace* parents = workspace.release();  // a fork has it without its threads
        owner = getpid();
    }
    num_threads = std::clamp(num_threads, 1, 1024);
    if (workspace == nullptr || workspace->team.size() != num_threads)
        workspace = std::make_unique<Workspace>(num_threads);
    return *workspace;
}

// Calls work(workspace) without the GIL.
template <class Work>
void run_shared(int num_threads, Work&& work) {
    const nb::gil_scoped_release unlocked;
    const std::lock_guard<std::mutex> lock(turn);
    work(shared_workspace(num_threads));
}

const TrainingKernels& training_kernels(const Level& level) {
    return find_training(level ? runnable(*level) : isa());
}

std::unique_ptr<SparsePlan> make_plan(const Mask& mask_NK) {
    const std::size_t N = mask_NK.shape(0), K = mask_NK.shape(1);
    if (N < 1 || K < 1 || N > (1u << 30) || K > (1u << 30))
        throw EngineError("a mask needs from 1 to 2^30 rows and columns");
    const nb::gil_scoped_release unlocked;
    return std::make_unique<SparsePlan>(mask_NK.data(), int(N), int(K));
}

nb::ndarray<nb::numpy, std::int64_t, nb::ndim<1>> positions(const SparsePlan& plan) {
    std::unique_ptr<std::int64_t[]> data(new std::int64_t[std::max<std::size_t>(1, plan.num_values())]);
    plan.positions(data.get());
    std::int64_t* pointer = data.release();
    nb::capsule owner(pointer, [](void* memory) noexcept { delete[] static_cast<std::int64_t*>(memory); });
    const std::size_t shape[] = {plan.num_values()};
    return nb::ndarray<nb::numpy, std::int64_t, nb::ndim<1>>(pointer, 1, shape, owner);
}

template <class X, class Y>
int check(const SparsePlan& plan, std::size_t num_values, const X& x_TK, const Y& y_TN) {
    const bool fits = x_TK.shape(0) == y_TN.shape(0) && int(x_TK.shape(1)) == plan.columns() &&
                      int(y_TN.shape(1)) == plan.rows() && num_values == plan.num_values();
    if (!fits || x_TK.shape(0) > (1u << 30)) {
        throw EngineError(
            "values [" + std::to_string(num_values) + "], inputs [" + std::to_string(x_TK.shape(0)) + ", " +
            std::to_string(x_TK.shape(1)) + "] and outputs [" + std::to_string(y_TN.shape(0)) + ", " +
            std::to_string(y_TN.shape(1)) + "] do not fit a mask [" + std::to_string(plan.rows()) + ", " +
            std::to_string(plan.columns()) + "] of " + std::to_string(plan.num_values()) + " values");
    }
    return int(x_TK.shape(0));
}

void forward(const SparsePlan& plan, Floats values, FloatMatrix x_TK, FloatMatrixOut y_TN, int num_threads,
             const Level& level) {
    const int T = check(plan, values.size(), x_TK, y_TN);
    const TrainingKernels& kernels = training_kernels(level);
    run_shared(num_threads, [&](Workspace& work) {
        plan.forward(work, kernels, values.data(), x_TK.data(), T, y_TN.data());
    });
}

void backward_input(const SparsePlan& plan, Floats values, FloatMatrix dy_TN, FloatMatrixOut dx_TK,
                    int num_threads, const Level& level) {
    const int T = check(plan, values.size(), dx_TK, dy_TN);
    const TrainingKernels& kernels = training_kernels(level);
    run_shared(num_threads, [&](Workspace& work) {
        plan.backward_input(work, kernels, values.data(), dy_TN.data(), T, dx_TK.data());
    });
}

void backward_values(const SparsePlan& plan, FloatMatrix x_TK, FloatMatrix dy_TN, FloatsOut dvalues,
                     int num_threads, const Level& level) {
    const int T = check(plan, dvalues.size(), x_TK, dy_TN);
    const TrainingKernels& kernels = training_kernels(level);
    run_shared(num_threads, [&](Workspace& work) {
        plan.backward_values(work, kernels, x_TK.data(), dy_TN.data(), T, dvalues.data());
    });
}

constexpr int kPiece = 16 * 1024;  // elements of an update that are worth a thread

void adamw(FloatsOut values, Floats gradient, FloatsOut exp_avg, FloatsOut exp_avg_sq, double learning_rate,
           double beta1, double beta2, double eps, double weight_decay, double step, int num_threads,
           const Level& level) {
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
    const AdamwKernels& kernels = find_adamw(level ? runnable(*level) : isa());
    const int pieces = int((count + kPiece - 1) / kPiece);
    run_shared(num_threads, [&](Workspace& work) {
        work.team.run([&](int thread) {
            const Part part(pieces, thread, work.team.size());
            const std::size_t begin = std::size_t(part.begin) * kPiece;
            const std::size_t end = std::min(count, std::size_t(part.end) * kPiece);
            kernels.adamw(factors, gradient.data() + begin, end - begin, exp_avg.data() + begin,
                          exp_avg_sq.data() + begin, values.data() + begin);
        });
    });
}

using Marks = nb::ndarray<const bool, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

// Calls work(begin, end) on the threads, for pieces of `count` elements that `marks` must fit.
template <class Work>
void run_marked(std::size_t count, const Marks& marks, int num_threads, Work&& work) {
    if (marks.size() != count) throw EngineError("marks must be as long as the values");
    const int pieces = int((count + kPiece - 1) / kPiece);
    run_shared(num_threads, [&](Workspace& space) {
        space.team.run([&](int thread) {
            const Part part(pieces, thread, space.team.size());
            work(std::size_t(part.begin) * kPiece, std::min(count, std::size_t(part.end) * kPiece));
        });
    });
}

void zero_marked(FloatsOut values, Marks marks, int num_threads) {
    float* v = values.data();
    const bool* marked = marks.data();
    run_marked(values.size(), marks, num_threads, [=](std::size_t begin, std::size_t end) {
        for (std::size_t i = begin; i < end; ++i)
            v[i] = std::bit_cast<float>(std::bit_cast<std::uint32_t>(v[i]) & (std::uint32_t(marked[i]) - 1));
    });
}

std::int64_t count_marked(Floats values, Marks marks, int num_threads) {
    const float* v = values.data();
    const bool* marked = marks.data();
    std::atomic<std::int64_t> found{0};
    run_marked(values.size(), marks, num_threads, [&](std::size_t begin, std::size_t end) {
        for (std::size_t piece = begin; piece < end; piece += kPiece) {
            std::uint32_t nonzero = 0;
            const std::size_t piece_end = std::min(end, piece + kPiece);
            for (std::size_t i = piece; i < piece_end; ++i)  // all bits but the sign
                nonzero +=
                    std::uint32_t((std::bit_cast<std::uint32_t>(v[i]) << 1) != 0) & std::uint32_t(marked[i]);
            found += nonzero;
        }
    });
    return found;
}

template <class T>
std::string shape_of(const T& array) {
    std::string shape = std::to_string(array.shape(0));
    for (std::size_t i = 1; i < array.ndim(); ++i) shape += ", " + std::to_string(array.shape(i));
    return "[" + shape + "]";
}

void check_ids(const char* what, const std::int64_t* ids, std::size_t count, std::size_t V) {
    for (std::size_t i = 0; i < count; ++i) {
        if (ids[i] < 0 || std::uint64_t(ids[i]) >= V)
            throw EngineError("found the id " + std::to_string(ids[i]) + " among the " + what +
                              "; expected ids from 0 to " + std::to_string(std::int64_t(V) - 1));
    }
}

// N, V and the type of the logits.
HeadLossTask task_of(const Logits& logits_NV, const LongIds& targets_N) {
    const std::size_t N = logits_NV.shape(0), V = logits_NV.shape(1);
    const bool wide = logits_NV.dtype() == nb::dtype<float>();
    if (!wide && logits_NV.dtype() != nb::dtype<std::uint16_t>())
        throw EngineError("logits must be float32, or the uint16 bits of bfloat16");
    if (N > (1u << 30) || V < 1 || V > (1u << 30) || targets_N.size() != N)
        throw EngineError("targets " + shape_of(targets_N) + " do not fit logits " + shape_of(logits_NV) +
                          "; expected [N] and [N, V], at most 2^30 each");
    check_ids("targets", targets_N.data(), N, V);
    return {.N = int(N),
            .V = int(V),
            .values = wide ? Values::f32 : Values::bf16,
            .logits_NV = logits_NV.data(),
            .targets_N = targets_N.data(),
            .weight = 1};
}

std::pair<double, double> head_loss(Logits logits_NV, LongIds targets_N, std::optional<LongIdMatrix> ids_NK,
                                    std::optional<FloatMatrix> log_p_NK, double temperature,
                                    double cross_entropy_weight, int num_threads, const Level& level) {
    HeadLossTask task = task_of(logits_NV, targets_N);
    if (!(cross_entropy_weight >= 0) || !std::isfinite(cross_entropy_weight))
        throw EngineError("found a weight of " + std::to_string(cross_entropy_weight) +
                          "; expected a finite one from 0 on");
    task.weight = float(cross_entropy_weight);
    if (bool(ids_NK) != bool(log_p_NK)) throw EngineError("a teacher has ids and log_p, or neither");
    if (ids_NK) {
        const std::size_t N = ids_NK->shape(0), K = ids_NK->shape(1);
        if (N != std::size_t(task.N) || K > std::size_t(task.V) || log_p_NK->shape(0) != N ||
            log_p_NK->shape(1) != K)
            throw EngineError("ids " + shape_of(*ids_NK) + " and log_p " + shape_of(*log_p_NK) +
                              " do not fit logits " + shape_of(logits_NV) +
                              "; expected [N, K] of both, and K of at most V");
        if (!(temperature > 0) || !std::isfinite(temperature))
            throw EngineError("found a temperature of " + std::to_string(temperature) +
                              "; expected one above 0");
        check_ids("teacher's ids", ids_NK->data(), N * K, std::size_t(task.V));
        task.has_teacher = true;
        task.K = int(K);
        task.ids_NK = ids_NK->data();
        task.log_p_NK = log_p_NK->data();
        task.temperature = float(temperature);
    }
    const Isa isa_found = level ? runnable(*level) : isa();
    HeadLossSums sums;
    run_shared(num_threads, [&](Workspace& work) { sums = head_loss_sums(task, work.team, isa_found); });
    return {sums.cross_entropy, sums.whole};
}

void sweep(FloatMatrixOut w_BN, StridedMatrix u_BB, Mask kept_BN, std::optional<Floats> scale_N,
           FloatMatrixOut error_BN, float largest, int num_threads, const Level& level) {
    const std::size_t B = w_BN.shape(0), N = w_BN.shape(1);
    const bool fits = u_BB.shape(0) == B && u_BB.shape(1) == B && u_BB.stride(1) == 1 &&
                      kept_BN.shape(0) == B && kept_BN.shape(1) == N && error_BN.shape(0) == B &&
                      error_BN.shape(1) == N && (!scale_N || scale_N->size() == N);
    if (!fits || B < 1 || B > (1u << 16) || N > (1u << 30))
        throw EngineError("U [B, B], marks, errors [B, N] and scales [N] must fit the weights [B, N]");
    const SweepTask task{.num_inputs = int(B),
                         .stride = N,
                         .u_stride = std::size_t(u_BB.stride(0)),
                         .u_BB = u_BB.data(),
                         .kept_BN = reinterpret_cast<const std::uint8_t*>(kept_BN.data()),
                         .scale_N = scale_N ? scale_N->data() : nullptr,
                         .largest = largest,
                         .w_BN = w_BN.data(),
                         .error_BN = error_BN.data()};
    const SweepKernels& kernels = find_sweep(level ? runnable(*level) : isa());
    const int strips = int((N + kSweepLanes - 1) / kSweepLanes);
    run_shared(num_threads, [&](Workspace& work) {
        const std::size_t size = B * kSweepLanes;
        const std::unique_ptr<float[]> scratch(new float[size * work.team.size()]);
        work.team.run([&](int thread) {
            const Part part(strips, thread, work.team.size());
            kernels.sweep(task, part.begin * kSweepLanes, std::min(int(N), part.end * kSweepLanes),
                          scratch.get() + thread * size);
        });
    });
}

}  // namespace

void bind_training(nb::module_& m) {
    nb::class_<SparsePlan>(m, "SparsePlan")
        .def(nb::new_(&make_plan), "mask_NK"_a)
        .def_prop_ro("rows", &SparsePlan::rows)
        .def_prop_ro("columns", &SparsePlan::columns)
        .def_prop_ro("num_values", &SparsePlan::num_values)
        .def_prop_ro("num_bytes", &SparsePlan::num_bytes)
        .def("positions", &positions)
        .def("forward", &forward, "values"_a, "x_TK"_a, "y_TN"_a.noconvert(), "num_threads"_a,
             "isa"_a = nb::none())
        .def("backward_input", &backward_input, "values"_a, "dy_TN"_a, "dx_TK"_a.noconvert(), "num_threads"_a,
             "isa"_a = nb::none())
        .def("backward_values", &backward_values, "x_TK"_a, "dy_TN"_a, "dvalues"_a.noconvert(),
             "num_threads"_a, "isa"_a = nb::none());
    m.def("adamw", &adamw, "values"_a.noconvert(), "gradient"_a.noconvert(), "exp_avg"_a.noconvert(),
          "exp_avg_sq"_a.noconvert(), nb::kw_only(), "learning_rate"_a, "beta1"_a, "beta2"_a, "eps"_a,
          "weight_decay"_a, "step"_a, "num_threads"_a, "isa"_a = nb::none());
    m.def("zero_marked", &zero_marked, "values"_a.noconvert(), "marks"_a.noconvert(), "num_threads"_a);
    m.def("count_marked", &count_marked, "values"_a.noconvert(), "marks"_a.noconvert(), "num_threads"_a);
    m.def("head_loss", &head_loss, "logits_NV"_a.noconvert(), "targets_N"_a.noconvert(),
          "ids_NK"_a.noconvert() = nb::none(), "log_p_NK"_a.noconvert() = nb::none(), nb::kw_only(),
          "temperature"_a = 1.0, "cross_entropy_weight"_a = 1.0, "num_threads"_a, "isa"_a = nb::none());
    m.def("sweep", &sweep, "w_BN"_a.noconvert(), "u_BB"_a.noconvert(), "kept_BN"_a.noconvert(),
          "scale_N"_a.none(), "error_BN"_a.noconvert(), nb::kw_only(), "largest"_a, "num_threads"_a,
          "isa"_a = nb::none());
}

}  // namespace gossamer
