// Prints a hash of what each kernel makes of made-up inputs: a line for each, so that two processors can be
// compared.
//
// Products and attention are not here: forward.cpp runs them over a packed model.

#include <bit>
#include <cmath>
#include <cstdio>
#include <vector>

#include "kernels/table.hpp"

namespace gossamer {
namespace {

// Numbers from a linear congruential generator: the same on every processor, between -1 and 1, times `scale`.
class Numbers {
  public:
    std::vector<float> floats(int count, float scale = 1) {
        std::vector<float> made(std::size_t(count), 0.0f);
        for (float& x : made) x = (float(next() >> 40) / float(1 << 23) - 1.0f) * scale;
        return made;
    }
    std::uint64_t next() { return state_ = state_ * 6364136223846793005u + 1442695040888963407u; }

  private:
    std::uint64_t state_ = 1;
};

// FNV-1a of everything that a kernel writes.
struct Hash {
    const char* family;
    std::uint64_t value = 14695981039346656037u;

    explicit Hash(const char* name) : family(name) {}
    ~Hash() { std::printf("%s %016llx\n", family, static_cast<unsigned long long>(value)); }
    template <class T>
    void add(const T* data, std::size_t count) {
        const auto* bytes = reinterpret_cast<const std::uint8_t*>(data);
        for (std::size_t i = 0; i < count * sizeof(T); ++i) value = (value ^ bytes[i]) * 1099511628211u;
    }
    template <class T>
    void add(const std::vector<T>& data) {
        add(data.data(), data.size());
    }
    template <class T>
    void add_one(T x) {
        add(&x, 1);
    }
};

constexpr int kLengths[] = {1, 2, 7, 16, 33, 100, 1031};

void run_vectors(const VectorKernels& kernels, Numbers& numbers) {
    Hash rmsnorm("rmsnorm"), swiglu("swiglu"), largest("largest"), quantize("quantize"), split("split");
    Hash layernorm("layernorm"), gelu("gelu"), geglu("geglu");
    for (const int count : kLengths) {
        const std::vector<float> x = numbers.floats(count, 20), w = numbers.floats(count);
        std::vector<float> y(x.size());
        std::vector<std::uint8_t> q(x.size());
        std::vector<std::uint16_t> high(x.size()), low(x.size());
        rmsnorm.add_one(kernels.rmsnorm(x.data(), w.data(), 1e-5f, count, y.data()));
        rmsnorm.add(y);
        layernorm.add_one(kernels.layernorm(x.data(), w.data(), w.data(), 1e-5f, count, y.data()));
        layernorm.add(y);
        gelu.add_one(kernels.gelu(x.data(), count, y.data()));
        gelu.add(y);
        geglu.add_one(kernels.geglu(x.data(), w.data(), count, y.data()));
        geglu.add(y);
        swiglu.add_one(kernels.swiglu(x.data(), w.data(), count, y.data()));
        swiglu.add(y);
        const float most = kernels.largest(x.data(), count);
        largest.add_one(most);
        quantize.add_one(kernels.quantize(x.data(), count, most, q.data()));
        quantize.add(q);
        kernels.split(x.data(), count, high.data(), low.data());
        split.add(high);
        split.add(low);
    }
}

void run_rope(const VectorKernels& kernels, Numbers& numbers) {
    Hash hash("rope");
    for (const int width : {2, 6, 64, 80}) {
        std::vector<float> x = numbers.floats(5 * width);
        kernels.rope(x.data(), 5, width, numbers.floats(width).data());
        hash.add(x);
    }
}

void run_sampling(const SamplingKernels& kernels, Numbers& numbers) {
    Hash highest("highest"), mass("mass"), keep("keep");
    for (const int count : kLengths) {
        const std::vector<float> x = numbers.floats(count, 12);
        std::vector<float> kept(x.size());
        highest.add_one(kernels.highest(x.data(), count));
        mass.add_one(kernels.mass(x.data(), count, {12, 0.7f}, -3));
        keep.add_one(kernels.keep(x.data(), count, -3, 5, kept.data()));
        keep.add(kept);
    }
}

void run_adamw(const AdamwKernels& kernels, Numbers& numbers) {
    Hash hash("adamw");
    const AdamwStep step{0.1f, 0.999f, 0.001f, 0.9999f, 0.003f, 0.5f, 1e-8f};
    const std::vector<float> g = numbers.floats(1031);
    std::vector<float> m = numbers.floats(1031), v = numbers.floats(1031), w = numbers.floats(1031);
    for (float& x : v) x = std::abs(x);
    kernels.adamw(step, g.data(), g.size(), m.data(), v.data(), w.data());
    hash.add(m);
    hash.add(v);
    hash.add(w);
}

void run_head_loss(Numbers& numbers) {
    Hash peak("peak"), total("total"), gradient("gradient");
    for (const int count : kLengths) {
        std::vector<float> z = numbers.floats(count, 12);
        std::vector<std::uint16_t> bits;
        for (float x : z) bits.push_back(std::uint16_t(std::bit_cast<std::uint32_t>(x) >> 16));
        const auto run = [&](Values values, auto& row) {
            const HeadLossKernels& kernels = find_head_loss(values, isa());
            peak.add_one(kernels.peak(row.data(), count));
            total.add_one(kernels.total(row.data(), count, {12, 0.7f}));
            kernels.gradient(row.data(), count, {12, 0.3f, 0.2f, 0.7f});
            gradient.add(row);
        };
        run(Values::f32, z);
        run(Values::bf16, bits);
    }
}

void run_sweep(const SweepKernels& kernels, Numbers& numbers) {
    constexpr int kInputs = 7, kOutputs = 37;
    Hash hash("sweep");
    std::vector<float> u = numbers.floats(kInputs * kInputs), scale = numbers.floats(kOutputs);
    std::vector<std::uint8_t> kept;
    for (int i = 0; i < kInputs * kOutputs; ++i) kept.push_back(std::uint8_t(numbers.next() >> 63));
    for (float& x : u) x = std::abs(x) + 0.1f;
    for (float& x : scale) x = std::abs(x) / 100 + 0.01f;
    std::vector<float> scratch(kInputs * kSweepLanes);
    for (const float* scales :
         {static_cast<const float*>(nullptr), static_cast<const float*>(scale.data())}) {
        std::vector<float> w = numbers.floats(kInputs * kOutputs), error(w.size());
        kernels.sweep(
            {kInputs, kOutputs, kInputs, u.data(), kept.data(), scales, 127, w.data(), error.data()}, 0,
            kOutputs, scratch.data());
        hash.add(w);
        hash.add(error);
    }
}

void run_training(const TrainingKernels& kernels, Numbers& numbers) {
    constexpr int kRows = 19;
    Hash multiply("multiply"), project("project");
    std::vector<std::uint8_t> counts, index;
    for (int r = 0; r < kRows; ++r) {
        counts.push_back(std::uint8_t(numbers.next() >> 60));
        for (int i = 0; i < counts.back(); ++i) index.push_back(std::uint8_t(6 * i + (numbers.next() >> 62)));
    }
    const std::vector<float> values = numbers.floats(int(index.size()));
    index.resize(index.size() + 4);
    const Strip strip{values.data(), index.data(), counts.data(), kRows};
    alignas(64) static float in[kStripInputs * kTileTokens], out[kRows * kTileTokens],
        delta[kRows * kTileTokens];
    for (float& x : in) x = numbers.floats(1)[0];
    for (float& x : delta) x = numbers.floats(1)[0];
    std::vector<float> gradient(values.size());
    kernels.multiply(strip, in, out);
    kernels.project(strip, in, delta, gradient.data());
    multiply.add(out, kRows * kTileTokens);
    project.add(gradient);
}

void run_probes(const ProbeKernels& kernels, Numbers& numbers) {
    Hash hash("read");
    const std::vector<float> data = numbers.floats(1024);
    hash.add_one(kernels.read(reinterpret_cast<const std::uint8_t*>(data.data()), 4096, 0));
}

}  // namespace
}  // namespace gossamer

int main() {
    using namespace gossamer;
    Numbers numbers;
    run_vectors(find_vector(isa()), numbers);
    run_rope(find_vector(isa()), numbers);
    run_sampling(find_sampling(isa()), numbers);
    run_adamw(find_adamw(isa()), numbers);
    run_head_loss(numbers);
    run_sweep(find_sweep(isa()), numbers);
    run_training(find_training(isa()), numbers);
    run_probes(find_probe(isa()), numbers);
}
