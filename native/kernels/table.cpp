#include "kernels/table.hpp"

#include "kernels/kernels.hpp"

namespace gossamer {
namespace {

constexpr AttentionRow kAttention[] = {
    {Values::f32, Isa::scalar, scalar::attention_f32}, {Values::f32, Isa::avx2, avx2::attention_f32},
    {Values::f32, Isa::avx512, avx512::attention_f32}, {Values::bf16, Isa::scalar, scalar::attention_bf16},
    {Values::bf16, Isa::avx2, avx2::attention_bf16},   {Values::bf16, Isa::avx512, avx512::attention_bf16},
    {Values::i8, Isa::scalar, scalar::attention_i8},   {Values::i8, Isa::avx2, avx2::attention_i8},
    {Values::i8, Isa::avx512, avx512::attention_i8},
};

constexpr VectorRow kVector[] = {
    {Isa::scalar, scalar::rmsnorm, scalar::swiglu, scalar::largest, scalar::quantize, scalar::split,
     scalar::rope},
    {Isa::avx512, avx512::rmsnorm, avx512::swiglu, avx512::largest, avx512::quantize, avx512::split,
     avx512::rope},
};

constexpr SamplingRow kSampling[] = {
    {Isa::scalar, scalar::highest, scalar::mass, scalar::keep},
    {Isa::avx2, avx2::highest, avx2::mass, scalar::keep},
    {Isa::avx512, avx512::highest, avx512::mass, avx512::keep},
};

constexpr AdamwRow kAdamw[] = {
    {Isa::scalar, scalar::adamw},
    {Isa::avx2, avx2::adamw},
    {Isa::avx512, avx512::adamw},
};

constexpr TrainingRow kTraining[] = {
    {Isa::scalar, scalar::multiply, scalar::project},
    {Isa::avx2, avx2::multiply, avx2::project},
    {Isa::avx512, avx512::multiply, avx512::project},
};

constexpr ProbeRow kProbe[] = {
    {Isa::scalar, scalar::read, scalar::multiply_int8, scalar::multiply_f32},
    {Isa::avx2, scalar::read, avx2::multiply_int8, avx2::multiply_f32},
    {Isa::avx512, avx512::read, avx512::multiply_int8, avx512::multiply_f32},
    {Isa::amx, avx512::read, amx::multiply_int8, avx512::multiply_f32},
};

// The last row, in a table that goes up, that `isa` can run.
template <class Row>
const Row& best(std::span<const Row> rows, Isa isa) {
    const Row* found = &rows[0];
    for (const Row& row : rows) {
        if (row.isa <= isa) found = &row;
    }
    return *found;
}

}  // namespace

std::vector<MatmulRow> matmul_table() {
    std::vector<MatmulRow> rows(std::begin(kFloatRows), std::end(kFloatRows));
    rows.insert(rows.end(), std::begin(kIntegerRows), std::end(kIntegerRows));
    return rows;
}
std::span<const VectorRow> vector_table() { return kVector; }
std::vector<AttentionRow> attention_table() {
    std::vector<AttentionRow> rows(std::begin(kAttention), std::end(kAttention));
    rows.push_back(kTileAttention);
    return rows;
}
std::span<const SamplingRow> sampling_table() { return kSampling; }
std::span<const AdamwRow> adamw_table() { return kAdamw; }
std::span<const TrainingRow> training_table() { return kTraining; }
std::span<const ProbeRow> probe_table() { return kProbe; }

const MatmulRow& find_matmul(Storage storage, Values values, Isa isa, bool emulated) {
    const MatmulRow* found = nullptr;
    const auto search = [&](std::span<const MatmulRow> rows) {
        for (const MatmulRow& row : rows) {
            const bool fits = row.storage == storage && row.values == values && row.isa <= isa;
            if (fits && (found == nullptr || row.isa > found->isa)) found = &row;
        }
    };
    if (emulated) {
        search(kEmulatedFloatRows);
        search(kEmulatedIntegerRows);
    }
    if (found == nullptr) {
        search(kFloatRows);
        search(kIntegerRows);
    }
    return *found;
}

const VectorRow& find_vector(Isa isa) { return best(vector_table(), isa); }
const SamplingRow& find_sampling(Isa isa) { return best(sampling_table(), isa); }
const AdamwRow& find_adamw(Isa isa) { return best(adamw_table(), isa); }
const TrainingRow& find_training(Isa isa) { return best(training_table(), isa); }
const ProbeRow& find_probe(Isa isa) { return best(probe_table(), isa); }

const AttentionRow& find_attention(Values values, Isa isa, bool emulated) {
    if (values == Values::bf16 && emulated) return kEmulatedTileAttention;
    if (values == Values::bf16 && isa == Isa::amx) return kTileAttention;
    const AttentionRow* found = nullptr;
    for (const AttentionRow& row : kAttention) {
        if (row.values == values && row.isa <= isa && (found == nullptr || row.isa > found->isa))
            found = &row;
    }
    return *found;
}

}  // namespace gossamer
