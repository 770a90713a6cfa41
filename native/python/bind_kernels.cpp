// The table of kernels as Python sees it, and entries that run one row of it: for tests and measurements.

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <memory>
#include <numeric>

#include "base/isa.hpp"
#include "base/threads.hpp"
#include "engine/kv_cache.hpp"
#include "engine/packed.hpp"
#include "engine/sampling.hpp"
#include "engine/scratch.hpp"
#include "kernels/table.hpp"
#include "python/arrays.hpp"
#include "python/model.hpp"

namespace gossamer {

using namespace nb::literals;

Isa runnable(const std::string& level) {
    const Isa wanted = parse_isa(level);
    if (!runs(wanted)) {
        throw UnsupportedError("asked for " + level + "; this machine, capped by GOSSAMER_ISA, runs up to " +
                               name(isa()));
    }
    return wanted;
}

namespace {

// Name -> whether this machine, capped by GOSSAMER_ISA, runs it, of all levels that can be chosen.
nb::dict levels() {
    nb::dict found;
    for (int i = 0; i < kNumIsas; ++i) {
        if (Isa(i) != Isa::amx_emulated) found[name(Isa(i))] = runs(Isa(i));
    }
    return found;
}

nb::list table() {
    nb::list rows;
    for (const Kernel& kernel : kernels()) {
        nb::dict row;
        row["family"] = kernel.family;
        row["values"] = name(kernel.values);
        row["storage"] = kStorageNames[int(kernel.storage)];
        row["isa"] = name(kernel.isa);
        rows.append(row);
    }
    return rows;
}

template <class Work>
double time_of(Work work) {
    const auto begin = std::chrono::steady_clock::now();
    work();
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

// One matrix of a packed buffer, checked, for the entries that run a single kernel.
struct Matrix {
    Linear w;
    const MatmulKernels* kernels;

    Matrix(const std::string& level, const Bytes& buffer, nb::dict tensors, nb::dict matrices,
           const std::string& name)
        : w(read_packed(buffer, tensors, matrices).linear(name)),
          kernels(&find_matmul(w.storage, w.values, runnable(level))) {
        ThreadPool pool(1);
        check_contents({{name, w}}, pool);
    }
};

// Inputs as kernels want them, rows up to a multiple of 16; those of bytes where the engine has them, at
// multiples of 64.
struct Inputs {
    std::vector<float> x, scale;
    Scratch q, q_block;
    std::vector<std::uint16_t> high, low;
    Activations activations;

    Inputs(const VectorKernels& vectors, const Linear& w, const FloatMatrix& x_TK)
        : q(num_bytes(x_TK)), q_block(num_bytes(x_TK)) {
        const int T = int(x_TK.shape(0)), K = int(x_TK.shape(1));
        if (K != w.columns || T < 1) throw EngineError("the inputs do not fit the matrix");
        const std::size_t stride = Activations::padded(K), size = num_bytes(x_TK);
        x.resize(size);
        std::fill_n(q.bytes(), size, std::uint8_t(128));
        high.resize(size);
        low.resize(size);
        scale.resize(std::size_t(T));
        activations = {.num_tokens = T,
                       .stride = stride,
                       .x = x.data(),
                       .q = q.bytes(),
                       .q_block = q_block.bytes(),
                       .scale = scale.data(),
                       .high = high.data(),
                       .low = low.data()};
        for (int t = 0; t < T; ++t) {
            const float* row = x_TK.data() + std::size_t(t) * K;
            std::copy(row, row + K, x.data() + t * stride);
            scale[t] = vectors.quantize(row, K, vectors.largest(row, K), q.bytes() + t * stride);
            if (T <= Activations::kBlockTokens)
                Activations::interleave(q.bytes() + t * stride, K, t, T, q_block.bytes());
            vectors.split(row, K, high.data() + t * stride, low.data() + t * stride);
        }
    }

  private:
    static std::size_t num_bytes(const FloatMatrix& x_TK) {
        return round_up(x_TK.shape(0), 16) * Activations::padded(int(x_TK.shape(1)));
    }
};

nb::ndarray<nb::numpy, float, nb::ndim<2>> matmul(const std::string& level, Bytes buffer, nb::dict tensors,
                                                  nb::dict matrices, const std::string& name,
                                                  FloatMatrix x_TK) {
    const Matrix matrix(level, buffer, tensors, matrices, name);
    const Inputs inputs(find_vector(runnable(level)), matrix.w, x_TK);
    const std::size_t stride = std::size_t(matrix.w.padded_rows());
    std::unique_ptr<float[]> y(new float[x_TK.shape(0) * stride]);
    matrix.kernels->matmul(matrix.w, 0, matrix.w.num_panels(), inputs.activations, y.get(), stride);
    return to_numpy(std::move(y), x_TK.shape(0), std::size_t(matrix.w.rows), stride);
}

nb::ndarray<nb::numpy, std::int32_t, nb::ndim<2>> accumulators(const std::string& level, Bytes buffer,
                                                               nb::dict tensors, nb::dict matrices,
                                                               const std::string& name, FloatMatrix x_TK) {
    const Matrix matrix(level, buffer, tensors, matrices, name);
    if (matrix.kernels->accumulate == nullptr)
        throw UnsupportedError(name + ": only int8 products have integer sums");
    const Inputs inputs(find_vector(runnable(level)), matrix.w, x_TK);
    const std::size_t stride = std::size_t(matrix.w.padded_rows());
    std::unique_ptr<std::int32_t[]> acc(new std::int32_t[x_TK.shape(0) * stride]);
    matrix.kernels->accumulate(matrix.w, 0, matrix.w.num_panels(), inputs.activations, acc.get(), stride);
    return to_numpy(std::move(acc), x_TK.shape(0), std::size_t(matrix.w.rows), stride);
}

nb::tuple rmsnorm(const std::string& level, FloatMatrix x_TD, Floats weight_D, float eps) {
    const std::size_t T = x_TD.shape(0), D = x_TD.shape(1);
    if (weight_D.size() != D) throw EngineError("the weights do not fit the inputs");
    std::unique_ptr<float[]> y(new float[T * D]), largest(new float[T]);
    const VectorKernels& kernels = find_vector(runnable(level));
    for (std::size_t t = 0; t < T; ++t)
        largest[t] = kernels.rmsnorm(x_TD.data() + t * D, weight_D.data(), eps, int(D), y.get() + t * D);
    return nb::make_tuple(to_numpy(std::move(y), T, D, D), to_numpy(std::move(largest), T, 1, 1));
}

// In place, as after a sublayer.
nb::tuple layernorm(const std::string& level, FloatMatrix x_TD, Floats weight_D, Floats bias_D, float eps) {
    const std::size_t T = x_TD.shape(0), D = x_TD.shape(1);
    if (weight_D.size() != D || bias_D.size() != D)
        throw EngineError("the weights or biases do not fit the inputs");
    std::unique_ptr<float[]> y(new float[T * D]), largest(new float[T]);
    std::copy_n(x_TD.data(), T * D, y.get());
    const VectorKernels& kernels = find_vector(runnable(level));
    for (std::size_t t = 0; t < T; ++t) {
        float* row = y.get() + t * D;
        largest[t] = kernels.layernorm(row, weight_D.data(), bias_D.data(), eps, int(D), row);
    }
    return nb::make_tuple(to_numpy(std::move(y), T, D, D), to_numpy(std::move(largest), T, 1, 1));
}

// In place, as after a product.
nb::tuple gelu(const std::string& level, FloatMatrix x_TN) {
    const std::size_t T = x_TN.shape(0), N = x_TN.shape(1);
    std::unique_ptr<float[]> y(new float[T * N]), largest(new float[T]);
    std::copy_n(x_TN.data(), T * N, y.get());
    const VectorKernels& kernels = find_vector(runnable(level));
    for (std::size_t t = 0; t < T; ++t) largest[t] = kernels.gelu(y.get() + t * N, int(N), y.get() + t * N);
    return nb::make_tuple(to_numpy(std::move(y), T, N, N), to_numpy(std::move(largest), T, 1, 1));
}

// A product of two rows, an activation function of the first.
template <auto kernel>
nb::tuple gated(const std::string& level, FloatMatrix gate_TN, FloatMatrix up_TN) {
    const std::size_t T = gate_TN.shape(0), N = gate_TN.shape(1);
    if (up_TN.shape(0) != T || up_TN.shape(1) != N) throw EngineError("gate and up have different shapes");
    std::unique_ptr<float[]> y(new float[T * N]), largest(new float[T]);
    const VectorKernels& kernels = find_vector(runnable(level));
    for (std::size_t t = 0; t < T; ++t) {
        const std::size_t begin = t * N;
        largest[t] = (kernels.*kernel)(gate_TN.data() + begin, up_TN.data() + begin, int(N), y.get() + begin);
    }
    return nb::make_tuple(to_numpy(std::move(y), T, N, N), to_numpy(std::move(largest), T, 1, 1));
}

float largest(const std::string& level, Floats x) {
    return find_vector(runnable(level)).largest(x.data(), int(x.size()));
}

nb::tuple quantize(const std::string& level, FloatMatrix x_TK) {
    const std::size_t T = x_TK.shape(0), K = x_TK.shape(1);
    std::unique_ptr<std::uint8_t[]> q(new std::uint8_t[T * K]);
    std::unique_ptr<float[]> scale(new float[T]);
    const VectorKernels& kernels = find_vector(runnable(level));
    for (std::size_t t = 0; t < T; ++t) {
        const float* x = x_TK.data() + t * K;
        scale[t] = kernels.quantize(x, int(K), kernels.largest(x, int(K)), q.get() + t * K);
    }
    return nb::make_tuple(to_numpy(std::move(q), T, K, K), to_numpy(std::move(scale), T, 1, 1));
}

nb::tuple split(const std::string& level, FloatMatrix x_TK) {
    const std::size_t T = x_TK.shape(0), K = x_TK.shape(1);
    std::unique_ptr<std::uint16_t[]> high(new std::uint16_t[T * K]), low(new std::uint16_t[T * K]);
    for (std::size_t t = 0; t < T; ++t) {
        const std::size_t begin = t * K;
        find_vector(runnable(level))
            .split(x_TK.data() + begin, int(K), high.get() + begin, low.get() + begin);
    }
    return nb::make_tuple(to_numpy(std::move(high), T, K, K), to_numpy(std::move(low), T, K, K));
}

// Attention of new tokens q_TAE over keys and values of one key/value head, the tokens being the last of the
// S positions, each of which sees `window` positions up to its own if `causal`, else a window that it is in
// the middle of, or all S; `split`: chunk by chunk, merged afterwards, as a long decode step does it.
nb::ndarray<nb::numpy, float, nb::ndim<2>> attention(const std::string& level, const std::string& kv,
                                                     FloatCube q_TAE, FloatMatrix k_SE, FloatMatrix v_SE,
                                                     int window, bool split, bool causal) {
    const int T = int(q_TAE.shape(0)), A = int(q_TAE.shape(1)), E = int(q_TAE.shape(2));
    const int S = int(k_SE.shape(0)), chunks = (S + kChunkPositions - 1) / kChunkPositions;
    const bool fits = int(k_SE.shape(1)) == E && int(v_SE.shape(1)) == E && int(v_SE.shape(0)) == S;
    if (!fits || T < 1 || T > S || (split && T != 1) || window < 1 || window > kNoWindow ||
        (!causal && window != kNoWindow && (split || window % 2 == 0)))
        throw EngineError("queries, keys and values do not fit together");
    const KvLayout layout{parse_kv(kv), E};
    KvCache cache(layout, 1, 1, S);
    cache.reserve(S);
    for (int s = 0; s < S; ++s)
        cache.store(0, 0, s, k_SE.data() + std::size_t(s) * E, v_SE.data() + std::size_t(s) * E, s + 1 == S);
    const std::size_t state = attention_state_floats(E) * std::size_t(A), stride = std::size_t(A) * E;
    std::vector<float> scratch(attention_scratch_floats(T * A, E)), states(split ? state * chunks : 0);
    std::unique_ptr<float[]> out(new float[std::size_t(T) * A * E]);
    AttentionTask task{.layout = layout,
                       .chunks = cache.chunks(),
                       .head_begin = 0,
                       .begin = 0,
                       .end = chunks,
                       .q = q_TAE.data(),
                       .out = out.get(),
                       .stride = stride,
                       .num_tokens = T,
                       .num_heads = A,
                       .position = S - 1,
                       .num_positions = S,
                       .window = window,
                       .scale = float(1.0 / std::sqrt(double(E))),
                       .state = nullptr,
                       .scratch = scratch.data()};
    const AttentionKernels& kernels = find_attention(layout.values, runnable(level));
    for (int t = 0; !split && t < T; t += task.num_tokens) {
        if (causal || window != kNoWindow) {  // those that begin in one chunk
            task.position = S - T + t + (causal ? 0 : window / 2);
            task.begin = first_chunk(task.position, window);
            task.num_tokens = std::min(T - t, same_first_chunk(task.position, window));
            task.q = q_TAE.data() + t * stride, task.out = out.get() + t * stride;
        }
        const int seen = std::min(S, task.position + task.num_tokens);
        task.end = (seen + kChunkPositions - 1) / kChunkPositions;
        kernels.attention(task);
    }
    const int begin = first_chunk(S - 1, window);
    for (int c = begin; split && c < chunks; ++c) {
        task.begin = c, task.end = c + 1, task.state = states.data() + state * c;
        kernels.attention(task);
    }
    for (int a = 0; split && a < A; ++a) {
        merge_attention(states.data() + state * begin + attention_state_floats(E) * a, state, chunks - begin,
                        E, out.get() + a * E);
    }
    return to_numpy(std::move(out), std::size_t(T) * A, std::size_t(E), std::size_t(E));
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> rope(const std::string& level, FloatMatrix x_HE, Floats cos_sin) {
    const std::size_t H = x_HE.shape(0), E = x_HE.shape(1);
    if (cos_sin.size() != E || E % 2 != 0) throw EngineError("the angles do not fit the heads");
    std::unique_ptr<float[]> y(new float[H * E]);
    std::copy_n(x_HE.data(), H * E, y.get());
    find_vector(runnable(level)).rope(y.get(), int(H), int(E), cos_sin.data());
    return to_numpy(std::move(y), H, E, E);
}

float highest(const std::string& level, Floats x) {
    return find_sampling(runnable(level)).highest(x.data(), int(x.size()));
}

std::uint64_t mass(const std::string& level, Floats x, float highest, float inverse_temperature, float low) {
    return find_sampling(runnable(level)).mass(x.data(), int(x.size()), {highest, inverse_temperature}, low);
}

nb::ndarray<nb::numpy, float, nb::ndim<2>> keep(const std::string& level, Floats x, float low, float high) {
    std::unique_ptr<float[]> kept(new float[x.size() + 1]);
    const int count = find_sampling(runnable(level)).keep(x.data(), int(x.size()), low, high, kept.get());
    return to_numpy(std::move(kept), 1, std::size_t(count), std::size_t(count));
}

int sample_token(const std::string& level, Floats logits_V, double temperature, int top_k, double top_p,
                 double min_p, double uniform) {
    return sample(find_sampling(runnable(level)), {logits_V.data(), logits_V.size()},
                  {temperature, top_k, top_p, min_p}, uniform);
}

nb::tuple token_log_probabilities(const std::string& level, Floats logits_V, int index, int num_likeliest) {
    const LogProbabilities found = log_probabilities(
        find_sampling(runnable(level)), {logits_V.data(), logits_V.size()}, index, num_likeliest);
    return nb::make_tuple(found.of_token, found.likeliest);
}

std::vector<double> read_bandwidth(int num_threads, std::size_t prefetch_bytes, Bytes buffer, int repeats) {
    const std::size_t chunk = 256 * 1024, num_chunks = buffer.size() / chunk;
    if (num_chunks < 1) throw EngineError("the buffer is smaller than 256 KiB; nothing to measure");
    nb::gil_scoped_release unlocked;
    ThreadPool pool(std::clamp(num_threads, 1, 1024));
    const auto read = find_probe(isa()).read;
    std::vector<std::uint64_t> sums(std::size_t(pool.size()) * 8);
    std::vector<double> rates;
    for (int i = 0; i < repeats; ++i) {
        const double seconds = time_of([&] {
            pool.run([&](int thread) {
                const Part part(int(num_chunks), thread, pool.size());
                sums[std::size_t(thread) * 8] =
                    read(buffer.data() + part.begin * chunk, (part.end - part.begin) * chunk, prefetch_bytes);
            });
        });
        rates.push_back(double(num_chunks * chunk) / seconds);
    }
    return rates;
}

// Multiply-adds a second on all threads, best of `repeats`.
double peak(std::uint64_t (*multiply)(std::uint64_t), int num_threads, int repeats) {
    constexpr std::uint64_t kRounds = 1 << 18;
    nb::gil_scoped_release unlocked;
    ThreadPool pool(std::clamp(num_threads, 1, 1024));
    double best = 0;
    for (int i = 0; i < repeats; ++i) {
        std::vector<std::uint64_t> products(std::size_t(pool.size()) * 8);
        const double seconds = time_of(
            [&] { pool.run([&](int thread) { products[std::size_t(thread) * 8] = multiply(kRounds); }); });
        best = std::max(best, double(std::accumulate(products.begin(), products.end(), 0.0)) / seconds);
    }
    return best;
}

double int8_peak(const std::string& level, int num_threads, int repeats) {
    return peak(find_probe(runnable(level)).multiply_int8, num_threads, repeats);
}

double f32_peak(const std::string& level, int num_threads, int repeats) {
    return peak(find_probe(runnable(level)).multiply_f32, num_threads, repeats);
}

// Seconds of a product with random inputs on one thread, `repeats` times.
std::vector<double> time_matmul(const std::string& level, Bytes buffer, nb::dict tensors, nb::dict matrices,
                                const std::string& name, FloatMatrix x_TK, int repeats) {
    const Matrix matrix(level, buffer, tensors, matrices, name);
    const Inputs inputs(find_vector(runnable(level)), matrix.w, x_TK);
    const std::size_t stride = std::size_t(matrix.w.padded_rows());
    std::vector<float> y(x_TK.shape(0) * stride);
    std::vector<double> seconds;
    for (int i = 0; i < repeats; ++i) {
        seconds.push_back(time_of([&] {
            matrix.kernels->matmul(matrix.w, 0, matrix.w.num_panels(), inputs.activations, y.data(), stride);
        }));
    }
    return seconds;
}

}  // namespace

void bind_kernels(nb::module_& m) {
    m.def("isa", [] { return std::string(name(isa())); });
    m.def("levels", &levels);
    m.def("kernels", &table);
    m.def("matmul", &matmul, "isa"_a, "buffer"_a, "tensors"_a, "matrices"_a, "name"_a, "x_TK"_a);
    m.def("accumulators", &accumulators, "isa"_a, "buffer"_a, "tensors"_a, "matrices"_a, "name"_a, "x_TK"_a);
    m.def("rmsnorm", &rmsnorm, "isa"_a, "x_TD"_a, "weight_D"_a, "eps"_a);
    m.def("layernorm", &layernorm, "isa"_a, "x_TD"_a, "weight_D"_a, "bias_D"_a, "eps"_a);
    m.def("gelu", &gelu, "isa"_a, "x_TN"_a);
    m.def("quantize", &quantize, "isa"_a, "x_TK"_a);
    m.def("largest", &largest, "isa"_a, "x"_a);
    m.def("split", &split, "isa"_a, "x_TK"_a);
    m.def("geglu", &gated<&VectorKernels::geglu>, "isa"_a, "gate_TN"_a, "up_TN"_a);
    m.def("swiglu", &gated<&VectorKernels::swiglu>, "isa"_a, "gate_TN"_a, "up_TN"_a);
    m.def("attention", &attention, "isa"_a, "kv"_a, "q_TAE"_a, "k_SE"_a, "v_SE"_a, "window"_a = kNoWindow,
          "split"_a = false, "causal"_a = true);
    m.def("rope", &rope, "isa"_a, "x_HE"_a, "cos_sin"_a);
    m.def("highest", &highest, "isa"_a, "x"_a);
    m.def("keep", &keep, "isa"_a, "x"_a, "low"_a, "high"_a);
    m.def("mass", &mass, "isa"_a, "x"_a, "highest"_a, "inverse_temperature"_a, "low"_a);
    m.def("sample", &sample_token, "isa"_a, "logits_V"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
          "uniform"_a);
    m.def("log_probabilities", &token_log_probabilities, "isa"_a, "logits_V"_a, "index"_a,
          "num_likeliest"_a = 0);
    m.def("time_matmul", &time_matmul, "isa"_a, "buffer"_a, "tensors"_a, "matrices"_a, "name"_a, "x_TK"_a,
          "repeats"_a);
    m.def("int8_peak", &int8_peak, "isa"_a, "num_threads"_a, "repeats"_a);
    m.def("f32_peak", &f32_peak, "isa"_a, "num_threads"_a, "repeats"_a);
    m.def("read_bandwidth", &read_bandwidth, "num_threads"_a, "prefetch_bytes"_a, "buffer"_a, "repeats"_a);
}

}  // namespace gossamer
