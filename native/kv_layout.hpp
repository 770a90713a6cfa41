// How the cached keys and values of one key/value head lie in memory: chunks of 256 positions.
//
// A chunk is [keys][values], and for i8 [key scales][value scales], in vectors of 64 bytes like those of
// weights, with I = 1 (f32), 2 (bf16) or 4 (i8) inputs: keys [position / 16][E / I][16 positions][I], so that
// scores need no horizontal sums; values [position / I][E padded to 16][I]. An i8 is stored as q + 128 with
// one scale a position, x = q * scale. What lies past the newest position means nothing, except that the
// values of a begun group of I positions are finite.
#pragma once

#include "view.hpp"

namespace gossamer {

constexpr int kChunkPositions = 256;
constexpr int kKeyBlock = 16;  // positions of a key vector, and outputs of a value vector

struct KvLayout {
    Values values;
    int head_dim;

    int inputs() const { return inputs_per_vector(values); }
    int key_steps() const { return (head_dim + inputs() - 1) / inputs(); }        // vectors of 16 positions
    int value_vectors() const { return (head_dim + kKeyBlock - 1) / kKeyBlock; }  // vectors of I positions
    std::size_t key_block_bytes() const { return std::size_t(key_steps()) * kVectorBytes; }
    std::size_t value_step_bytes() const { return std::size_t(value_vectors()) * kVectorBytes; }
    std::size_t values_begin() const { return key_block_bytes() * (kChunkPositions / kKeyBlock); }
    std::size_t scales_begin() const {
        return values_begin() + value_step_bytes() * std::size_t(kChunkPositions / inputs());
    }
    std::size_t chunk_bytes() const {
        return scales_begin() + (values == Values::i8 ? 2 * kChunkPositions * sizeof(float) : 0);
    }
    // What attention reads of one position, padding aside.
    std::size_t position_bytes() const {
        return std::size_t(head_dim) * 8 / inputs() + (values == Values::i8 ? 2 * sizeof(float) : 0);
    }
};

}  // namespace gossamer
