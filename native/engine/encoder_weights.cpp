#include "engine/encoder_weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <string_view>

namespace gossamer {
namespace {

constexpr std::string_view kRoles[] = {"q", "k", "v", "o", "up", "down"};
constexpr std::string_view kGatedRoles[] = {"q", "k", "v", "o", "gate", "up", "down"};

void check_config(const EncoderConfig& c) {
    check_sizes({c.hidden_size, c.vocab_size, c.num_heads, c.head_dim, c.intermediate_size, c.num_positions});
    if (!c.types.empty()) check_sizes({c.num_types});
    if (std::int64_t(c.num_heads) * c.head_dim > kMaxSize)
        throw FormatError("the model's config: heads times head width is more than 2^24");
    if (c.first_position < 0 || c.first_position >= c.num_positions) {
        throw FormatError("the model's config: the first position has row " +
                          std::to_string(c.first_position) + "; expected 0 .. " +
                          std::to_string(c.num_positions - 1));
    }
    if (!std::isfinite(c.norm_eps) || c.norm_eps < 0)
        throw FormatError("the model's config: norm_eps must be finite and not negative");
    for (const EncoderRope& rope : c.ropes) {
        const std::vector<float>& found = rope.inverse_frequencies;
        const auto finite = [](float number) { return std::isfinite(number); };
        if (c.head_dim % 2 != 0 || found.size() != std::size_t(c.head_dim / 2) || !finite(rope.scale) ||
            !std::all_of(found.begin(), found.end(), finite))
            throw FormatError(
                "the model's config: a rope must have a finite frequency for each pair of a head");
    }
    if (c.blocks.empty()) throw FormatError("the model's config has no blocks; expected at least one");
}

LayerNorm read_norm(const WeightReader& reader, const std::string& name, const EncoderConfig& config,
                    const float* zeros) {
    if (name.empty()) return {};
    const std::size_t width = std::size_t(config.hidden_size);
    return {.weight = reader.vector(name + ".weight", width),
            .bias = config.norm_bias ? reader.vector(name + ".bias", width) : zeros};
}

EncoderBlock read_block(WeightReader& reader, const EncoderConfig& config, int index, const float* zeros,
                        int num_threads) {
    const EncoderBlockConfig& block = config.blocks[std::size_t(index)];
    if (config.gated)
        check_roles(block.names, kGatedRoles, index);
    else
        check_roles(block.names, kRoles, index);
    const bool has_middle = block.window == 0 || block.window % 2 == 1;
    if (block.window < 0 || !has_middle || block.rope < -1 || block.rope >= int(config.ropes.size()))
        throw FormatError("block " + std::to_string(index) + ": found a window or a rope that is none");
    const int D = config.hidden_size, F = config.intermediate_size, AE = config.num_heads * config.head_dim;
    const auto linear = [&](const char* role, int rows, int columns) {
        return reader.affine(block.names, role, rows, columns);
    };
    const auto q = linear("q", AE, D), k = linear("k", AE, D), v = linear("v", AE, D);
    const auto o = linear("o", D, AE);
    std::vector<Affine> inner;
    if (config.gated) inner.push_back(linear("gate", F, D));
    inner.push_back(linear("up", F, D));
    const auto down = linear("down", D, F);
    const LayerNorm attention = read_norm(reader, block.attention_norm, config, zeros);
    const LayerNorm feed_forward = read_norm(reader, block.feed_forward_norm, config, zeros);
    return {.qkv = Group({q, k, v}, false, num_threads),
            .o = Group({o}, false, num_threads),
            .inner = Group(std::move(inner), config.gated, num_threads),
            .down = Group({down}, false, num_threads),
            .first = config.norm_first ? attention : LayerNorm{},
            .middle = config.norm_first ? feed_forward : attention,
            .last = config.norm_first ? LayerNorm{} : feed_forward,
            .rope = block.rope,
            .window = block.window == 0 ? kNoWindow : std::min(block.window, kNoWindow)};
}

}  // namespace

EncoderWeights read_weights(const Packed& packed, const EncoderConfig& config, ThreadPool& pool) {
    check_config(config);
    WeightReader reader(packed);
    const std::size_t width = std::size_t(config.hidden_size);
    std::vector<float> zeros(width);
    const auto norm = [&](const std::string& name) { return read_norm(reader, name, config, zeros.data()); };
    const auto table = [&](const std::string& name, int rows) {
        return name.empty() ? nullptr : reader.vector(name, std::size_t(rows) * width);
    };
    EncoderWeights weights{.embedding = reader.table(config.embedding, config.vocab_size, config.hidden_size),
                           .positions = table(config.positions, config.num_positions),
                           .types = table(config.types, config.num_types),
                           .norm = norm(config.norm),
                           .final_norm = norm(config.final_norm),
                           .blocks = {},
                           .zeros = {}};
    for (int i = 0; i < int(config.blocks.size()); ++i)
        weights.blocks.push_back(read_block(reader, config, i, zeros.data(), pool.size()));
    weights.zeros = std::move(zeros);
    reader.check_contents(pool);
    return weights;
}

}  // namespace gossamer
