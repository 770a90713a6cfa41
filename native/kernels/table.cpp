#include "kernels/table.hpp"

#include "kernels/kernels.hpp"

namespace gossamer {
namespace {

constexpr VectorRow kVector[] = {
    {Isa::scalar, scalar::rmsnorm, scalar::quantize, scalar::split, scalar::swiglu, scalar::attention, scalar::read},
    {Isa::avx512, avx512::rmsnorm, avx512::quantize, avx512::split, avx512::swiglu, avx512::attention, avx512::read},
};

}  // namespace

std::vector<MatmulRow> matmul_table() {
    std::vector<MatmulRow> rows(std::begin(kFloatRows), std::end(kFloatRows));
    rows.insert(rows.end(), std::begin(kIntegerRows), std::end(kIntegerRows));
    return rows;
}
std::span<const VectorRow> vector_table() { return kVector; }

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

const VectorRow& find_vector(Isa isa) {
    const VectorRow* found = &kVector[0];
    for (const VectorRow& row : kVector) {
        if (row.isa <= isa && row.isa > found->isa) found = &row;
    }
    return *found;
}

}  // namespace gossamer
