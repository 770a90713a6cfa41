// The weights of a mapped .goss file, checked as if an enemy had written it.
//
// Python reads the header (packed/reader.py) and says where each tensor lies; here every offset, mask
// population, scale and row sum is checked before a kernel may touch it, since a kernel follows them without
// looking.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "base/threads.hpp"
#include "base/view.hpp"

namespace gossamer {

// Where a tensor lies in the buffer.
struct Tensor {
    std::string dtype;
    std::vector<std::size_t> shape;
    std::size_t offset;
    std::size_t num_bytes;
};

// One row of the table of matrices in the header.
struct MatrixEntry {
    Storage storage;
    Values values;
    int rows;
    int columns;
};

struct Packed {
    const std::uint8_t* data = nullptr;  // 64-byte aligned
    std::size_t num_bytes = 0;
    std::map<std::string, Tensor> tensors;
    std::map<std::string, MatrixEntry> matrices;

    // Matrix `name` with its tensors found and their shapes and offsets checked, but not yet its contents.
    Linear linear(const std::string& name) const;

    // A float32 vector of `count` numbers, all finite, zero padded to a multiple of 16.
    const float* vector(const std::string& name, std::size_t count) const;

  private:
    const std::uint8_t* tensor(const std::string& name, const char* dtype,
                               std::vector<std::size_t> shape) const;
};

Storage parse_storage(const std::string& name);

// Checks the contents of matrices on all threads; FormatError names the first (in order) that is damaged.
void check_contents(const std::vector<std::pair<std::string, Linear>>& linears, ThreadPool& pool);

}  // namespace gossamer
