#include "engine/weights.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <set>
#include <string_view>
#include <utility>

namespace gossamer {
namespace {

constexpr std::string_view kRoles[] = {"q", "k", "v", "o", "gate", "up", "down"};
constexpr const char* kRoleList = "q, k, v, o, gate, up and down";
constexpr int kMaxSize = 1 << 24;  // keeps every byte count below 2^64

void check_config(const DecoderConfig& c) {
    for (int size :
         {c.hidden_size, c.vocab_size, c.num_heads, c.num_kv_heads, c.head_dim, c.intermediate_size}) {
        if (size < 1 || size > kMaxSize)
            throw FormatError("the model's config has the size " + std::to_string(size) +
                              "; expected 1 .. 2^24");
    }
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

void check_block(const BlockConfig& block, const std::string& where) {
    const auto known = [](const std::string& role) {
        return std::find(std::begin(kRoles), std::end(kRoles), role) != std::end(kRoles);
    };
    for (const auto* roles : {&block.linears, &block.biases}) {
        for (const auto& [role, name] : *roles) {
            if (!known(role)) throw FormatError(where + ": found role " + role + "; expected " + kRoleList);
        }
    }
    if (block.linears.size() != std::size(kRoles))
        throw FormatError(where + ": a linear is missing; expected " + kRoleList);
    if (block.window < 0) throw FormatError(where + ": found a negative attention window");
}

// Finds a decoder's weights in a file and checks their shapes; remembers the matrices for check_contents.
class Reader {
  public:
    Reader(const Packed& packed, const DecoderConfig& config, int num_threads)
        : packed_(packed), config_(config), num_threads_(num_threads) {}

    Linear matrix(const std::string& name, int rows, int columns) {
        const Linear w = packed_.linear(name);
        if (w.rows != rows || w.columns != columns) {
            throw FormatError(name + ": found " + std::to_string(w.rows) + " x " + std::to_string(w.columns) +
                              "; expected " + std::to_string(rows) + " x " + std::to_string(columns) +
                              " from the model's config");
        }
        if (names_.insert(name).second) matrices_.emplace_back(name, w);
        return w;
    }

    Block block(int index) {
        const BlockConfig& block = config_.blocks[std::size_t(index)];
        check_block(block, "block " + std::to_string(index));
        const int D = config_.hidden_size, F = config_.intermediate_size, E = config_.head_dim;
        const int AE = config_.num_heads * E, GE = config_.num_kv_heads * E;
        const auto linear = [&](const char* role, int rows, int columns) {
            const auto bias = block.biases.find(role);
            return Affine{.w = matrix(block.linears.at(role), rows, columns),
                          .bias = bias == block.biases.end() ? nullptr : packed_.vector(bias->second, rows)};
        };
        const auto head_norm = [&](const std::string& name) {
            return name.empty() ? nullptr : packed_.vector(name, E);
        };
        const auto q = linear("q", AE, D), k = linear("k", GE, D), v = linear("v", GE, D);
        const auto o = linear("o", D, AE), gate = linear("gate", F, D), up = linear("up", F, D);
        const auto down = linear("down", D, F);
        return {.attention_norm = packed_.vector(block.attention_norm, D),
                .feed_forward_norm = packed_.vector(block.feed_forward_norm, D),
                .query_norm = head_norm(block.query_norm),
                .key_norm = head_norm(block.key_norm),
                .rope = block.rope,
                .window = block.window == 0 ? kNoWindow : std::min(block.window, kNoWindow),
                .qkv = Group({q, k, v}, false, num_threads_),
                .o = Group({o}, false, num_threads_),
                .gate_up = Group({gate, up}, true, num_threads_),
                .down = Group({down}, false, num_threads_)};
    }

    const std::vector<std::pair<std::string, Linear>>& matrices() const { return matrices_; }

  private:
    const Packed& packed_;
    const DecoderConfig& config_;
    int num_threads_;
    std::set<std::string> names_;
    std::vector<std::pair<std::string, Linear>> matrices_;  // in the order of the blocks
};

}  // namespace

DecoderWeights read_weights(const Packed& packed, const DecoderConfig& config, ThreadPool& pool) {
    check_config(config);
    Reader reader(packed, config, pool.size());
    const Linear embedding = reader.matrix(config.embedding, config.vocab_size, config.hidden_size);
    if (embedding.storage == Storage::sparse)
        throw FormatError(config.embedding + ": expected dense storage, as rows are looked up one by one");
    const Linear head = reader.matrix(config.head, config.vocab_size, config.hidden_size);
    DecoderWeights weights{.embedding = embedding,
                           .final_norm = packed.vector(config.final_norm, config.hidden_size),
                           .head = Group({{.w = head}}, false, pool.size(), true),
                           .blocks = {}};
    for (int i = 0; i < int(config.blocks.size()); ++i) weights.blocks.push_back(reader.block(i));
    check_contents(reader.matrices(), pool);
    return weights;
}

}  // namespace gossamer
