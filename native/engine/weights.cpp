#include "engine/weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>

namespace gossamer {
namespace {

constexpr std::string_view kRoles[] = {"q", "k", "v", "o", "gate", "up", "down"};

void check_config(const DecoderConfig& c) {
    check_sizes({c.hidden_size, c.vocab_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size});
    if (std::int64_t(c.num_heads) * c.head_dim > kMaxSize)
        throw FormatError("the model's config: heads times head width is more than 2^24");
    if (c.num_heads % c.num_kv_heads != 0 || c.head_dim % 2 != 0 ||
        c.inverse_frequencies.size() != std::size_t(c.head_dim / 2)) {
        throw FormatError("the model's config: heads, key/value heads and head width do not fit together");
    }
    const auto finite = [](float number) { return std::isfinite(number); };
    if (!finite(c.norm_eps) || c.norm_eps < 0 || !finite(c.rotary_scale) ||
        !std::all_of(c.inverse_frequencies.begin(), c.inverse_frequencies.end(), finite)) {
        throw FormatError(
            "the model's config: norm_eps, frequencies and rotary_scale must be finite, norm_eps not "
            "negative");
    }
    if (c.blocks.empty()) throw FormatError("the model's config has no blocks; expected at least one");
}

Block read_block(WeightReader& reader, const DecoderConfig& config, int index, int num_threads) {
    const BlockConfig& block = config.blocks[std::size_t(index)];
    check_roles(block.names, kRoles, index);
    if (block.window < 0)
        throw FormatError("block " + std::to_string(index) + ": found a negative attention window");
    const int D = config.hidden_size, F = config.intermediate_size, E = config.head_dim;
    const int AE = config.num_heads * E, GE = config.num_kv_heads * E;
    const auto linear = [&](const char* role, int rows, int columns) {
        return reader.affine(block.names, role, rows, columns);
    };
    const auto head_norm = [&](const std::string& name) {
        return name.empty() ? nullptr : reader.vector(name, std::size_t(E));
    };
    const auto q = linear("q", AE, D), k = linear("k", GE, D), v = linear("v", GE, D);
    const auto o = linear("o", D, AE), gate = linear("gate", F, D), up = linear("up", F, D);
    const auto down = linear("down", D, F);
    return {.attention_norm = reader.vector(block.attention_norm, std::size_t(D)),
            .feed_forward_norm = reader.vector(block.feed_forward_norm, std::size_t(D)),
            .query_norm = head_norm(block.query_norm),
            .key_norm = head_norm(block.key_norm),
            .rope = block.rope,
            .window = block.window == 0 ? kNoWindow : std::min(block.window, kNoWindow),
            .qkv = Group({q, k, v}, false, num_threads),
            .o = Group({o}, false, num_threads),
            .gate_up = Group({gate, up}, true, num_threads),
            .down = Group({down}, false, num_threads)};
}

}  // namespace

DecoderWeights read_weights(const Packed& packed, const DecoderConfig& config, ThreadPool& pool) {
    check_config(config);
    WeightReader reader(packed);
    const Linear embedding = reader.table(config.embedding, config.vocab_size, config.hidden_size);
    const Linear head = reader.matrix(config.head, config.vocab_size, config.hidden_size);
    DecoderWeights weights{.embedding = embedding,
                           .final_norm = packed.vector(config.final_norm, std::size_t(config.hidden_size)),
                           .head = Group({{.w = head}}, false, pool.size(), true),
                           .blocks = {}};
    for (int i = 0; i < int(config.blocks.size()); ++i)
        weights.blocks.push_back(read_block(reader, config, i, pool.size()));
    reader.check_contents(pool);
    return weights;
}

}  // namespace gossamer
