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
#define KERNEL(level, row, family, values, storage, name) \
    {#family, Values::values, Storage::storage, Isa::level},
#include "kernels/list.hpp"
#undef KERNEL
};

// Sets those functions of Row that are still missing, that the level itself has, and whose values and storage
// is_for(values, storage) accepts.
template <class Row, class For>
void take(Row& found, Isa isa, For is_for) {
#define KERNEL(level, row, family, values, storage, name)                                             \
    if constexpr (std::is_same_v<Row, row>) {                                                         \
        if (isa == Isa::level && found.family == nullptr && is_for(Values::values, Storage::storage)) \
            found.family = level::name;                                                               \
    }
#include "kernels/list.hpp"
#undef KERNEL
}

// The functions in Row that `isa` runs.
template <class Row, class For>
Row resolve(Isa isa, For is_for) {
    Row found{};
    for (; isa != Isa::scalar; isa = builds_on(isa)) take(found, isa, is_for);
    take(found, Isa::scalar, is_for);
    return found;
}

// row(isa) of every level, found once.
template <class Make>
auto for_all_levels(Make row) {
    std::array<decltype(row(Isa::scalar)), kNumIsas> rows;
    for (int i = 0; i < kNumIsas; ++i) rows[i] = row(Isa(i));
    return rows;
}

template <class Row>
const Row& find(Isa isa) {
    static const auto rows =
        for_all_levels([](Isa level) { return resolve<Row>(level, [](Values, Storage) { return true; }); });
    return rows[int(isa)];
}

MatmulRow matmul_row(Storage storage, Values values, Isa isa) {
    const auto is_for = [&](Values v, Storage s) { return v == values && s == storage; };
    const auto has_matmul = [&](Isa level) {
        return std::any_of(std::begin(kKernels), std::end(kKernels), [&](const Kernel& kernel) {
            return kernel.family == std::string_view("matmul") && kernel.isa == level &&
                   is_for(kernel.values, kernel.storage);
        });
    };
    MatmulRow row = resolve<MatmulRow>(isa, is_for);
    for (row.isa = isa; !has_matmul(row.isa);) row.isa = builds_on(row.isa);
    return row;
}

}  // namespace

std::span<const Kernel> kernels() { return kKernels; }

const MatmulRow& find_matmul(Storage storage, Values values, Isa isa) {
    static const auto rows = for_all_levels([](Isa level) {
        std::array<std::array<MatmulRow, 2>, kNumValues> all;
        for (int v = 0; v < kNumValues; ++v) {
            for (Storage s : {Storage::dense, Storage::sparse})
                all[v][int(s)] = matmul_row(s, Values(v), level);
        }
        return all;
    });
    return rows[int(isa)][int(values)][int(storage)];
}

const AttentionRow& find_attention(Values values, Isa isa) {
    static const auto rows = for_all_levels([](Isa level) {
        std::array<AttentionRow, kNumValues> all;
        for (int kv = 0; kv < kNumValues; ++kv)
            all[kv] = resolve<AttentionRow>(level, [&](Values v, Storage) { return v == Values(kv); });
        return all;
    });
    return rows[int(isa)][int(values)];
}

const VectorRow& find_vector(Isa isa) { return find<VectorRow>(isa); }
const SamplingRow& find_sampling(Isa isa) { return find<SamplingRow>(isa); }
const AdamwRow& find_adamw(Isa isa) { return find<AdamwRow>(isa); }
const TrainingRow& find_training(Isa isa) { return find<TrainingRow>(isa); }
const ProbeRow& find_probe(Isa isa) { return find<ProbeRow>(isa); }

}  // namespace gossamer
