// What an encoder is made of: its anatomy as data, and the weights that the anatomy names in a packed file.
//
// An encoder is tables of words, positions and types, whose rows are added and normalized, and blocks:
// attention, then a feed-forward network, each added to its input, and a LayerNorm of the sum. All blocks
// have the same sizes. Nothing here knows a family of models.
#pragma once

#include <string>
#include <vector>

#include "base/threads.hpp"
#include "engine/linears.hpp"
#include "engine/packed.hpp"
#include "engine/weight_reader.hpp"

namespace gossamer {

// The names of one block's weights in the packed file. The roles are q, k, v, o, up and down; a norm is named
// without `.weight` and `.bias`.
struct EncoderBlockConfig {
    BlockNames names;
    std::string attention_norm, feed_forward_norm;
};

struct EncoderConfig {
    int hidden_size, vocab_size, num_heads, head_dim, intermediate_size;
    int num_positions, first_position, num_types;  // rows of the tables, and that of a text's first token
    float norm_eps;
    std::string embedding, positions, types, norm;
    std::vector<EncoderBlockConfig> blocks;

    // Tokens of a text, at most.
    int max_length() const { return num_positions - first_position; }
};

struct LayerNorm {
    const float *weight, *bias;
};

struct EncoderBlock {
    Group qkv, o, up, down;
    LayerNorm attention_norm, feed_forward_norm;
};

struct EncoderWeights {
    Linear embedding;
    const float* positions;  // [num_positions][D]
    const float* types;      // [num_types][D]
    LayerNorm norm;
    std::vector<EncoderBlock> blocks;
};

// The weights that `config` names, with shapes and contents checked. FormatError says what is missing, or
// contradicts the config, or is damaged.
EncoderWeights read_weights(const Packed& packed, const EncoderConfig& config, ThreadPool& pool);

}  // namespace gossamer
