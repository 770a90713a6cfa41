// Finds a model's weights in a packed file by the names in its config, and checks their shapes.
#pragma once

#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/threads.hpp"
#include "engine/linears.hpp"
#include "engine/packed.hpp"

namespace gossamer {

constexpr int kMaxSize = 1 << 24;  // of what a config says: keeps every byte count below 2^64

// The matrices of a block, and the biases of those that have one, by role: names in the packed file.
struct BlockNames {
    std::map<std::string, std::string> linears, biases;
};

// FormatError unless all sizes are 1 .. kMaxSize.
void check_sizes(std::initializer_list<int> sizes);

// FormatError unless a block's linears have exactly these roles, and no biases have others.
void check_roles(const BlockNames& block, std::span<const std::string_view> roles, int index);

class WeightReader {
  public:
    explicit WeightReader(const Packed& packed) : packed_(packed) {}

    Linear matrix(const std::string& name, int rows, int columns);

    // A matrix whose rows are looked up one by one, and which is dense therefore.
    Linear table(const std::string& name, int rows, int columns);

    Affine affine(const BlockNames& block, const char* role, int rows, int columns);

    const float* vector(const std::string& name, std::size_t count) const {
        return packed_.vector(name, count);
    }

    // Of all matrices that were asked for, when there are no more to come.
    void check_contents(ThreadPool& pool) const { gossamer::check_contents(matrices_, pool); }

  private:
    const Packed& packed_;
    std::set<std::string> names_;
    std::vector<std::pair<std::string, Linear>> matrices_;  // in the order of the blocks
};

}  // namespace gossamer
