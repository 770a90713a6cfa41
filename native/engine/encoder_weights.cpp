#include "engine/encoder_weights.hpp"

#include <cmath>
#include <cstdint>
#include <string_view>

namespace gossamer {
namespace {

constexpr std::string_view kRoles[] = {"q", "k", "v", "o", "up", "down"};

void check_config(const EncoderConfig& c) {
    check_sizes({c.hidden_size, c.vocab_size, c.num_heads, c.head_dim, c.intermediate_size, c.num_positions,
                 c.num_types});
    if (std::int64_t(c.num_heads) * c.head_dim > kMaxSize)
        throw FormatError("the model's config: heads times head width is more than 2^24");
    if (c.first_position < 0 || c.first_position >= c.num_positions) {
        throw FormatError("the model's config: the first position has row " +
                          std::to_string(c.first_position) + "; expected 0 .. " +
                          std::to_string(c.num_positions - 1));
    }
    if (!std::isfinite(c.norm_eps) || c.norm_eps < 0)
        throw FormatError("the model's config: norm_eps must be finite and not negative");
    if (c.blocks.empty()) throw FormatError("the model's config has no blocks; expected at least one");
}

LayerNorm read_norm(const WeightReader& reader, const std::string& name, int width) {
    return {.weight = reader.vector(name + ".weight", std::size_t(width)),
            .bias = reader.vector(name + ".bias", std::size_t(width))};
}

EncoderBlock read_block(WeightReader& reader, const EncoderConfig& config, int index, int num_threads) {
    const EncoderBlockConfig& block = config.blocks[std::size_t(index)];
    check_roles(block.names, kRoles, index);
    const int D = config.hidden_size, F = config.intermediate_size, AE = config.num_heads * config.head_dim;
    const auto linear = [&](const char* role, int rows, int columns) {
        return reader.affine(block.names, role, rows, columns);
    };
    const auto q = linear("q", AE, D), k = linear("k", AE, D), v = linear("v", AE, D);
    const auto o = linear("o", D, AE), up = linear("up", F, D), down = linear("down", D, F);
    return {.qkv = Group({q, k, v}, false, num_threads),
            .o = Group({o}, false, num_threads),
            .up = Group({up}, false, num_threads),
            .down = Group({down}, false, num_threads),
            .attention_norm = read_norm(reader, block.attention_norm, D),
            .feed_forward_norm = read_norm(reader, block.feed_forward_norm, D)};
}

}  // namespace

EncoderWeights read_weights(const Packed& packed, const EncoderConfig& config, ThreadPool& pool) {
    check_config(config);
    WeightReader reader(packed);
    const std::size_t width = std::size_t(config.hidden_size);
    EncoderWeights weights{
        .embedding = reader.table(config.embedding, config.vocab_size, config.hidden_size),
        .positions = reader.vector(config.positions, std::size_t(config.num_positions) * width),
        .types = reader.vector(config.types, std::size_t(config.num_types) * width),
        .norm = read_norm(reader, config.norm, config.hidden_size),
        .blocks = {}};
    for (int i = 0; i < int(config.blocks.size()); ++i)
        weights.blocks.push_back(read_block(reader, config, i, pool.size()));
    reader.check_contents(pool);
    return weights;
}

}  // namespace gossamer
