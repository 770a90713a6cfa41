#include "kernels/table.hpp"

#include <algorithm>
#include <array>
#include <iterator>
#include <string_view>
#include <type_traits>

#include "kernels/kernels.hpp"

namespace gossamer {
namespace {

constexpr Kernel kKernels[] = {
#define KERNEL(level, kernels, family, values, storage, name) \
    {#family, Values::values, Storage::storage, Isa::level},
#include "kernels/list.hpp"
#undef KERNEL
};

// Sets those functions of Kernels that are still missing, that the level itself has, and whose values and
// storage is_for(values, storage) accepts.
template <class Kernels, class For>
void take(Kernels& found, Isa isa, For is_for) {
#define KERNEL(level, kernels, family, values, storage, name)                                         \
    if constexpr (std::is_same_v<Kernels, kernels>) {                                                 \
        if (isa == Isa::level && found.family == nullptr && is_for(Values::values, Storage::storage)) \
            found.family = level::name;                                                               \
    }
#include "kernels/list.hpp"
#undef KERNEL
}

// The functions of Kernels that `isa` runs.
template <class Kernels, class For>
Kernels resolve(Isa isa, For is_for) {
    Kernels found{};
    for (; isa != Isa::scalar; isa = builds_on(isa)) take(found, isa, is_for);
    take(found, Isa::scalar, is_for);
    return found;
}

// make(isa) of every level, found once.
template <class Make>
auto for_all_levels(Make make) {
    std::array<decltype(make(Isa::scalar)), kNumIsas> levels;
    for (int i = 0; i < kNumIsas; ++i) levels[i] = make(Isa(i));
    return levels;
}

template <class Kernels>
const Kernels& find(Isa isa) {
    static const auto levels = for_all_levels(
        [](Isa level) { return resolve<Kernels>(level, [](Values, Storage) { return true; }); });
    return levels[int(isa)];
}

template <class Kernels>
const Kernels& find_by_values(Values values, Isa isa) {
    static const auto levels = for_all_levels([](Isa level) {
        std::array<Kernels, kNumValues> all;
        for (int i = 0; i < kNumValues; ++i)
            all[i] = resolve<Kernels>(level, [&](Values v, Storage) { return v == Values(i); });
        return all;
    });
    return levels[int(isa)][int(values)];
}

MatmulKernels matmul_kernels(Storage storage, Values values, Isa isa) {
    const auto is_for = [&](Values v, Storage s) { return v == values && s == storage; };
    const auto has_matmul = [&](Isa level) {
        return std::any_of(std::begin(kKernels), std::end(kKernels), [&](const Kernel& kernel) {
            return kernel.family == std::string_view("matmul") && kernel.isa == level &&
                   is_for(kernel.values, kernel.storage);
        });
    };
    MatmulKernels found = resolve<MatmulKernels>(isa, is_for);
    for (found.isa = isa; !has_matmul(found.isa);) found.isa = builds_on(found.isa);
    return found;
}

}  // namespace

std::span<const Kernel> kernels() { return kKernels; }

const MatmulKernels& find_matmul(Storage storage, Values values, Isa isa) {
    static const auto levels = for_all_levels([](Isa level) {
        std::array<std::array<MatmulKernels, kNumStorages>, kNumValues> all{};
        for (int v = 0; v < kNumValues; ++v) {
            for (Storage s : {Storage::dense, Storage::sparse})
                all[v][int(s)] = matmul_kernels(s, Values(v), level);
        }
        all[int(Values::i8)][int(Storage::blocks)] = matmul_kernels(Storage::blocks, Values::i8, level);
        return all;
    });
    return levels[int(isa)][int(values)][int(storage)];
}

const AttentionKernels& find_attention(Values values, Isa isa) {
    return find_by_values<AttentionKernels>(values, isa);
}

const HeadLossKernels& find_head_loss(Values values, Isa isa) {
    return find_by_values<HeadLossKernels>(values, isa);
}

const VectorKernels& find_vector(Isa isa) { return find<VectorKernels>(isa); }
const SamplingKernels& find_sampling(Isa isa) { return find<SamplingKernels>(isa); }
const AdamwKernels& find_adamw(Isa isa) { return find<AdamwKernels>(isa); }
const SweepKernels& find_sweep(Isa isa) { return find<SweepKernels>(isa); }
const TrainingKernels& find_training(Isa isa) { return find<TrainingKernels>(isa); }
const ProbeKernels& find_probe(Isa isa) { return find<ProbeKernels>(isa); }

}  // namespace gossamer
