// Rows of the embedding, read out of the panels of a dense matrix of any type.
#pragma once

#include <cstddef>

#include "base/view.hpp"

namespace gossamer {

// Writes row `row` of `table` as float32 [columns]: of integers, the int8 weight (as the kernels see it)
// times the scale of its row, rounded once. One plain loop serves every level of instructions: a token looks
// up one row, where its head reads all of them.
void look_up(const Linear& table, int row, float* x_D);

// File bytes that a look-up touches: the row's weights, and what belongs to the row alone.
std::size_t row_bytes(const Linear& table);

}  // namespace gossamer
