#include "engine/weight_reader.hpp"

#include <algorithm>

namespace gossamer {

void check_sizes(std::initializer_list<int> sizes) {
    for (int size : sizes) {
        if (size < 1 || size > kMaxSize)
            throw FormatError("the model's config has the size " + std::to_string(size) +
                              "; expected 1 .. 2^24");
    }
}

void check_roles(const BlockNames& block, std::span<const std::string_view> roles, int index) {
    const std::string where = "block " + std::to_string(index);
    std::string list;
    for (std::size_t i = 0; i < roles.size(); ++i)
        list += (i == 0 ? "" : i + 1 < roles.size() ? ", " : " and ") + std::string(roles[i]);
    for (const auto* names : {&block.linears, &block.biases}) {
        for (const auto& [role, name] : *names) {
            if (std::find(roles.begin(), roles.end(), role) == roles.end())
                throw FormatError(where + ": found role " + role + "; expected " + list);
        }
    }
    if (block.linears.size() != roles.size())
        throw FormatError(where + ": a linear is missing; expected " + list);
}

Linear WeightReader::matrix(const std::string& name, int rows, int columns) {
    const Linear w = packed_.linear(name);
    if (w.rows != rows || w.columns != columns) {
        throw FormatError(name + ": found " + std::to_string(w.rows) + " x " + std::to_string(w.columns) +
                          "; expected " + std::to_string(rows) + " x " + std::to_string(columns) +
                          " from the model's config");
    }
    if (names_.insert(name).second) matrices_.emplace_back(name, w);
    return w;
}

Linear WeightReader::table(const std::string& name, int rows, int columns) {
    const Linear w = matrix(name, rows, columns);
    if (w.storage != Storage::dense)
        throw FormatError(name + ": expected dense storage, as rows are looked up one by one");
    return w;
}

Affine WeightReader::affine(const BlockNames& block, const char* role, int rows, int columns) {
    const auto bias = block.biases.find(role);
    return {.w = matrix(block.linears.at(role), rows, columns),
            .bias = bias == block.biases.end() ? nullptr : vector(bias->second, std::size_t(rows))};
}

}  // namespace gossamer
