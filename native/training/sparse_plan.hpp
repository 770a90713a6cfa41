// A fixed mask of a weight matrix W [N, K], and the three products of training with its values alone:
// y = x W^T, dx = dy W and dW = dy^T x at the mask's positions.
#pragma once

#include <cstdint>
#include <vector>

#include "base/team.hpp"
#include "kernels/table.hpp"

namespace gossamer {

// Values of a masked matrix in the order in which products read them: strips of 96 inputs; in a strip, row
// after row; in a row, by input. 96 rows of a strip are a tile.
struct StripOrder {
    int rows, inputs;
    std::vector<std::uint64_t> tile_begin;  // first value of each tile [strips][tiles of rows], and the end
    std::vector<std::uint8_t> counts;       // values of each row in each strip [strips][rows]
    std::vector<std::uint8_t> index;        // input within the strip of each value; 4 bytes of padding

    int num_strips() const { return (inputs + kStripInputs - 1) / kStripInputs; }
    int num_row_tiles() const { return (rows + kStripInputs - 1) / kStripInputs; }
    // The first value of a tile of rows, or the end of the strip's for row_tile = num_row_tiles().
    std::uint64_t begin(int strip, int row_tile) const {
        return tile_begin[std::size_t(strip) * num_row_tiles() + row_tile];
    }
    Strip strip(const float* values, int strip, int first_row_tile, int num_rows) const {
        const std::uint64_t v = begin(strip, first_row_tile);
        const std::size_t row = std::size_t(strip) * rows + std::size_t(first_row_tile) * kStripInputs;
        return {values + v, index.data() + v, counts.data() + row, num_rows};
    }
};

// Threads, and the memory that products use while they run; it stays for the next one.
class Workspace {
  public:
    explicit Workspace(int num_threads) : team(num_threads), owned_(std::size_t(num_threads)) {}

    Team team;
    // Makes room for as many floats; what was there is lost. Not inside a task.
    void reserve(std::size_t floats_a_thread, std::size_t shared_floats = 0);
    // At multiples of 64 bytes.
    float* owned(int thread) { return aligned(owned_[std::size_t(thread)]); }
    float* shared() { return aligned(shared_); }

  private:
    static float* aligned(std::vector<float>& memory);

    std::vector<std::vector<float>> owned_;
    std::vector<float> shared_;
};

class SparsePlan {
  public:
    // `mask_NK`: true where a weight lives.
    SparsePlan(const bool* mask_NK, int rows, int columns);

    int rows() const { return forward_.rows; }
    int columns() const { return forward_.inputs; }
    std::size_t num_values() const { return forward_.tile_begin.back(); }
    std::size_t num_bytes() const;
    // n * K + k of each value.
    void positions(std::int64_t* out) const;

    // Arrays are row-major; outputs are written whole. Sums do not depend on the number of threads.
    void forward(Workspace& work, const TrainingKernels& kernels, const float* values, const float* x_TK,
                 int T, float* y_TN) const;
    void backward_input(Workspace& work, const TrainingKernels& kernels, const float* values,
                        const float* dy_TN, int T, float* dx_TK) const;
    void backward_values(Workspace& work, const TrainingKernels& kernels, const float* x_TK,
                         const float* dy_TN, int T, float* dvalues) const;

  private:
    void transpose();

    StripOrder forward_;                 // rows are outputs; the order in which values are kept
    StripOrder backward_;                // rows are inputs: W^T
    std::vector<std::uint16_t> source_;  // of each value of backward_: its place within its tile of forward_
};

}  // namespace gossamer
