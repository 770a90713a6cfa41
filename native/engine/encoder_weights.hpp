// What an encoder is made of: its anatomy as data, and the weights that the anatomy names in a packed file.
//
// An encoder is a table of words, to whose rows those of positions and types may be added, a LayerNorm, and
// blocks: attention, then a feed-forward network, each added to its input. A LayerNorm of each sublayer is
// applied to its input or to that sum; in the former case there is one more after the last block. All blocks
// have the same sizes. Nothing here knows a family of models.
#pragma once

#include <string>
#include <vector>

#include "base/threads.hpp"
#include "engine/linears.hpp"
#include "engine/packed.hpp"
#include "engine/weight_reader.hpp"

namespace gossamer {

// The names of one block's weights in the packed file. The roles are q, k, v, o, up and down, and gate where
// the network is gated; a norm is named without `.weight` and `.bias`, and an empty name is no norm.
struct EncoderBlockConfig {
    BlockNames names;
    std::string attention_norm, feed_forward_norm;
    int rope;    // number of the config's rope, or -1: none
    int window;  // positions that a token is in the middle of and sees, or 0: all
};

struct EncoderRope {
    std::vector<float> inverse_frequencies;  // of half a head's numbers
    float scale;                             // of cosines and sines
};

struct EncoderConfig {
    int hidden_size, vocab_size, num_heads, head_dim, intermediate_size;
    int num_positions, first_position, num_types;  // rows of the tables, and that of a text's first token
    float norm_eps;
    bool norm_first, norm_bias, gated;
    std::string embedding, positions, types, norm, final_norm;  // an empty name is no table and no norm
    std::vector<EncoderRope> ropes;
    std::vector<EncoderBlockConfig> blocks;

    // Tokens of a text, at most.
    int max_length() const { return num_positions - first_position; }
};

struct LayerNorm {
    const float *weight, *bias;  // null: there is no such norm
};

struct EncoderBlock {
    Group qkv, o, inner, down;      // inner: up, or gate and up
    LayerNorm first, middle, last;  // of what enters, after attention, and of what leaves
    int rope, window;               // or -1, or kNoWindow
};

struct EncoderWeights {
    Linear embedding;
    const float* positions;  // [num_positions][D], or null
    const float* types;      // [num_types][D], or null
    LayerNorm norm, final_norm;
    std::vector<EncoderBlock> blocks;
    std::vector<float> zeros;  // the bias of norms that have none
};

// The weights that `config` names, with shapes and contents checked. FormatError says what is missing, or
// contradicts the config, or is damaged.
EncoderWeights read_weights(const Packed& packed, const EncoderConfig& config, ThreadPool& pool);

}  // namespace gossamer
