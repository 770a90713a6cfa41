#include "kernels/table.hpp"

#include "kernels/kernels.hpp"

namespace gossamer {
namespace {

constexpr MatmulRow kMatmul[] = {
    {Values::f32, Storage::dense, Isa::scalar, scalar::matmul_dense_f32, nullptr},
    {Values::f32, Storage::dense, Isa::avx512, avx512::matmul_dense_f32, nullptr},
    {Values::bf16, Storage::dense, Isa::scalar, scalar::matmul_dense_bf16, nullptr},
    {Values::bf16, Storage::dense, Isa::avx512, avx512::matmul_dense_bf16, nullptr},
    {Values::i8, Storage::dense, Isa::scalar, scalar::matmul_dense_i8, scalar::accumulate_dense_i8},
    {Values::i8, Storage::dense, Isa::avx512, avx512::matmul_dense_i8, avx512::accumulate_dense_i8},
    {Values::i8, Storage::sparse, Isa::scalar, scalar::matmul_sparse_i8, scalar::accumulate_sparse_i8},
    {Values::i8, Storage::sparse, Isa::avx512, avx512::matmul_sparse_i8, avx512::accumulate_sparse_i8},
};

constexpr VectorRow kVector[] = {
    {Isa::scalar, scalar::rmsnorm, scalar::quantize, scalar::swiglu, scalar::rope, scalar::read},
    {Isa::avx512, avx512::rmsnorm, avx512::quantize, avx512::swiglu, avx512::rope, avx512::read},
};

constexpr AttentionRow kAttention[] = {
    {Values::f32, Isa::scalar, scalar::attention_f32},   {Values::f32, Isa::avx512, avx512::attention_f32},
    {Values::bf16, Isa::scalar, scalar::attention_bf16}, {Values::bf16, Isa::avx512, avx512::attention_bf16},
    {Values::i8, Isa::scalar, scalar::attention_i8},     {Values::i8, Isa::avx512, avx512::attention_i8},
};

}  // namespace

std::span<const MatmulRow> matmul_table() { return kMatmul; }
std::span<const VectorRow> vector_table() { return kVector; }
std::span<const AttentionRow> attention_table() { return kAttention; }

const MatmulRow& find_matmul(Storage storage, Values values, Isa isa) {
    const MatmulRow* found = nullptr;
    for (const MatmulRow& row : kMatmul) {
        const bool fits = row.storage == storage && row.values == values && row.isa <= isa;
        if (fits && (found == nullptr || row.isa > found->isa)) found = &row;
    }
    if (found == nullptr)
        throw UnsupportedError("no kernel multiplies sparse f32 or bf16 weights; store them dense");
    return *found;
}

const VectorRow& find_vector(Isa isa) {
    const VectorRow* found = &kVector[0];
    for (const VectorRow& row : kVector) {
        if (row.isa <= isa && row.isa > found->isa) found = &row;
    }
    return *found;
}

const AttentionRow& find_attention(Values values, Isa isa) {
    const AttentionRow* found = nullptr;
    for (const AttentionRow& row : kAttention) {
        if (row.values == values && row.isa <= isa && (found == nullptr || row.isa > found->isa))
            found = &row;
    }
    return *found;
}

}  // namespace gossamer
