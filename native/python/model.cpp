#include "python/model.hpp"

#include <nanobind/stl/tuple.h>

#include <tuple>

#include "python/fields.hpp"

namespace gossamer {
namespace {

Fields block_fields(nb::handle block, std::size_t index) {
    return {block, "block " + std::to_string(index) + " of the model's config"};
}

BlockNames read_names(const Fields& fields) {
    return {.linears = fields.texts("linears"), .biases = fields.texts("biases")};
}

EncoderBlockConfig read_encoder_block(nb::handle block, std::size_t index) {
    const Fields fields = block_fields(block, index);
    return {.names = read_names(fields),
            .attention_norm = fields.text("attention_norm"),
            .feed_forward_norm = fields.text("feed_forward_norm"),
            .rope = fields.integer("rope"),
            .window = fields.integer("window")};
}

EncoderRope read_rope(nb::handle rope) {
    const Fields fields(rope, "a rope of the model's config");
    return {.inverse_frequencies = fields.floats("inverse_frequencies"), .scale = fields.number("scale")};
}

BlockConfig read_block(nb::handle block, std::size_t index) {
    const Fields fields = block_fields(block, index);
    return {.names = read_names(fields),
            .attention_norm = fields.text("attention_norm"),
            .feed_forward_norm = fields.text("feed_forward_norm"),
            .query_norm = fields.text("query_norm"),
            .key_norm = fields.text("key_norm"),
            .rope = fields.flag("rope"),
            .window = fields.integer("window")};
}

MatrixEntry read_matrix(nb::handle entry, const std::string& name) {
    const Fields fields(entry, "the table's entry of matrix " + name);
    return {.storage = parse_storage(fields.text("storage")),
            .values = parse_values(fields.text("values")),
            .rows = fields.integer("rows"),
            .columns = fields.integer("columns")};
}

Tensor read_tensor(nb::handle entry, const std::string& name) {
    std::tuple<std::string, std::vector<std::size_t>, std::size_t, std::size_t> found;
    if (!nb::try_cast(entry, found))
        throw FormatError("tensor " + name + ": expected dtype, shape, byte offset and byte length");
    auto [dtype, shape, offset, num_bytes] = std::move(found);
    return {.dtype = dtype, .shape = shape, .offset = offset, .num_bytes = num_bytes};
}

}  // namespace

nb::handle matrix_table(nb::dict config) { return Fields(config, "the model's config").at("linears"); }

DecoderConfig read_decoder_config(nb::dict config) {
    const Fields fields(config, "the model's config");
    DecoderConfig found{.hidden_size = fields.integer("hidden_size"),
                        .vocab_size = fields.integer("vocab_size"),
                        .num_heads = fields.integer("num_heads"),
                        .num_kv_heads = fields.integer("num_kv_heads"),
                        .head_dim = fields.integer("head_dim"),
                        .intermediate_size = fields.integer("intermediate_size"),
                        .norm_eps = fields.number("norm_eps"),
                        .inverse_frequencies = fields.floats("inverse_frequencies"),
                        .rotary_scale = fields.number("rotary_scale"),
                        .embedding = fields.text("embedding"),
                        .final_norm = fields.text("final_norm"),
                        .head = fields.text("head"),
                        .blocks = {}};
    for (nb::handle block : fields.list("blocks"))
        found.blocks.push_back(read_block(block, found.blocks.size()));
    return found;
}

EncoderConfig read_encoder_config(nb::dict config) {
    const Fields fields(config, "the model's config");
    EncoderConfig found{.hidden_size = fields.integer("hidden_size"),
                        .vocab_size = fields.integer("vocab_size"),
                        .num_heads = fields.integer("num_heads"),
                        .head_dim = fields.integer("head_dim"),
                        .intermediate_size = fields.integer("intermediate_size"),
                        .num_positions = fields.integer("num_positions"),
                        .first_position = fields.integer("first_position"),
                        .num_types = fields.integer("num_types"),
                        .norm_eps = fields.number("norm_eps"),
                        .norm_first = fields.flag("norm_first"),
                        .norm_bias = fields.flag("norm_bias"),
                        .gated = fields.flag("gated"),
                        .embedding = fields.text("embedding"),
                        .positions = fields.text("positions"),
                        .types = fields.text("types"),
                        .norm = fields.text("norm"),
                        .final_norm = fields.text("final_norm"),
                        .ropes = {},
                        .blocks = {}};
    for (nb::handle rope : fields.list("ropes")) found.ropes.push_back(read_rope(rope));
    for (nb::handle block : fields.list("blocks"))
        found.blocks.push_back(read_encoder_block(block, found.blocks.size()));
    return found;
}

Packed read_packed(const Bytes& buffer, nb::dict tensors, nb::handle matrices) {
    if (buffer.size() == 0) throw FormatError("found an empty buffer; expected a whole packed model");
    if (reinterpret_cast<std::uintptr_t>(buffer.data()) % 64 != 0) {
        throw EngineError(
            "the packed model's buffer must begin at a multiple of 64 bytes, as a memory map does");
    }
    Packed packed{.data = buffer.data(), .num_bytes = buffer.size()};
    for (const auto& [name, entry] : Fields(tensors, "the table of tensors").items())
        packed.tensors[name] = read_tensor(entry, name);
    for (const auto& [name, entry] : Fields(matrices, "the table of matrices").items())
        packed.matrices[name] = read_matrix(entry, name);
    return packed;
}

}  // namespace gossamer
