// What a decoder is made of: its anatomy as data, and the weights that the anatomy names in a packed file.
//
// A decoder is an embedding, blocks (attention, then a feed-forward network, each behind an RMSNorm and added
// to its input), a last RMSNorm and a head. All blocks have the same sizes. Nothing here knows a family of
// models: names of tensors and all that differs between families comes with DecoderConfig.
#pragma once

#include <string>
#include <vector>

#include "base/threads.hpp"
#include "engine/linears.hpp"
#include "engine/packed.hpp"
#include "engine/weight_reader.hpp"

namespace gossamer {

// What is particular to one block: the names of its weights in the packed file, and its attention. The roles
// are q, k, v, o, gate, up and down.
struct BlockConfig {
    BlockNames names;
    std::string attention_norm, feed_forward_norm;
    std::string query_norm, key_norm;  // of width E, over each head; "" where there is none
    bool rope;                         // whether queries and keys are rotated by their position
    int window;  // how many positions a token attends to, its own included, or 0: all before it
};

struct DecoderConfig {
    int hidden_size, vocab_size, num_heads, num_kv_heads, head_dim, intermediate_size;
    float norm_eps;
    std::vector<float> inverse_frequencies;   // of rotary embedding, [E / 2]
    float rotary_scale;                       // multiplies the cosines and sines of rotary embedding
    std::string embedding, final_norm, head;  // the head may be the embedding
    std::vector<BlockConfig> blocks;
};

struct Block {
    const float* attention_norm;
    const float* feed_forward_norm;
    const float* query_norm;  // or null, like key_norm
    const float* key_norm;
    bool rope;
    int window;  // or kNoWindow
    Group qkv, o, gate_up, down;
};

struct DecoderWeights {
    Linear embedding;
    const float* final_norm;
    Group head;
    std::vector<Block> blocks;
};

// The weights that `config` names, with shapes and contents checked. FormatError says what is missing, or
// contradicts the config, or is damaged.
DecoderWeights read_weights(const Packed& packed, const DecoderConfig& config, ThreadPool& pool);

}  // namespace gossamer
