// How the cached keys and values of one key/value head lie in memory: chunks of 256 positions.
//
// A chunk has these parts, one after the other:
//
//   scales   [256 of keys][256 of values]               for i8 only: one float32 for each position
//   keys     [position / 64][E / I][64 positions][I]    so that scores need no horizontal sums
//   values   [E / 64][position / I][64 of E][I]         the last block only as wide as E, padded to 16, needs
//
// Keys and values are vectors of 64 bytes like those of weights, with I = 1 (f32), 2 (bf16) or 4 (i8) inputs,
// in blocks of 64 columns, so that kernels read a chunk from its first byte to its last. An i8 is stored as q
// + 128, and x = q * scale. What lies past the newest position means nothing, except that the values of a
// begun group of I positions are finite, and that the keys of a begun vector of 16 positions are zeros.
#pragma once

#include <algorithm>

#include "base/view.hpp"

namespace gossamer {

constexpr int kChunkPositions = 256;
constexpr int kKvBlock = 64;  // positions of a block of keys, elements of a block of values
constexpr int kKvLanes = 16;  // of these in a vector

struct KvLayout {
    Values values;
    int head_dim;

    int inputs() const { return inputs_per_vector(values); }
    int key_steps() const { return (head_dim + inputs() - 1) / inputs(); }  // vectors of 16 positions
    int value_vectors() const { return (head_dim + kKvLanes - 1) / kKvLanes; }
    int num_value_blocks() const { return (head_dim + kKvBlock - 1) / kKvBlock; }

    std::size_t keys_begin() const { return is_integer(values) ? 2 * kChunkPositions * sizeof(float) : 0; }
    // Of a block: where it begins, and its bytes from one step (I elements; I positions) to the next.
    static constexpr std::size_t key_step_bytes() { return kKvBlock / kKvLanes * kVectorBytes; }
    std::size_t key_block(int block) const {
        return keys_begin() + std::size_t(block) * std::size_t(key_steps()) * key_step_bytes();
    }
    int value_block_vectors(int block) const {
        return std::min(kKvBlock / kKvLanes, value_vectors() - block * (kKvBlock / kKvLanes));
    }
    std::size_t value_step_bytes(int block) const {
        return std::size_t(value_block_vectors(block)) * kVectorBytes;
    }
    std::size_t value_block(int block) const {
        return key_block(kChunkPositions / kKvBlock) +
               std::size_t(block) * std::size_t(kChunkPositions / inputs()) * key_step_bytes();
    }
    std::size_t chunk_bytes() const {
        const int last = num_value_blocks() - 1;
        return value_block(last) + value_step_bytes(last) * std::size_t(kChunkPositions / inputs());
    }
    // What attention reads of one position, padding aside.
    std::size_t position_bytes() const {
        return std::size_t(head_dim) * 8 / inputs() + (is_integer(values) ? 2 * sizeof(float) : 0);
    }
};

}  // namespace gossamer
