// What everything native speaks of: panels of weights, blocks of activations, and the errors of the Python
// side.
//
// A panel is 16 output rows; a vector is 64 bytes of it, 16 rows x I consecutive inputs in the order
// [row][input] (I = 1 for f32, 2 for bf16, 4 for i8). docs/format.md has the whole layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

namespace gossamer {

constexpr int kPanelRows = 16;
constexpr int kVectorBytes = 64;
constexpr int kGroupVectors = 16;  // vectors whose masks lie together in a sparse stream
constexpr int kTokenBlock = 8;     // tokens that a kernel multiplies with one weight vector
constexpr std::size_t kSlackBytes = 64;

enum class Storage { dense, sparse };
enum class Values { f32, bf16, i8 };

// Raised as gossamer.errors.<same name> (bindings.cpp).
struct FormatError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct EngineError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct ConfigError : std::runtime_error {
    using std::runtime_error::runtime_error;
};
struct UnsupportedError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

constexpr std::size_t round_up(std::size_t number, std::size_t multiple) {
    return (number + multiple - 1) / multiple * multiple;
}

constexpr int inputs_per_vector(Values values) {
    return values == Values::f32 ? 1 : values == Values::bf16 ? 2 : 4;
}

// One weight matrix w_NK, validated, in the mapped file.
struct Linear {
    Storage storage = Storage::dense;
    Values values = Values::f32;
    int rows = 0;                        // N
    int columns = 0;                     // K
    const std::uint8_t* data = nullptr;  // dense panels, or the sparse stream
    const std::uint64_t* offsets =
        nullptr;                        // sparse: byte offset of each panel in the stream, then of the end
    const float* scale = nullptr;       // i8: [N padded to 16]
    const std::int32_t* sum = nullptr;  // i8: [N padded to 16], sum over the inputs of the int8 weights

    int num_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
    int num_vectors() const { return (columns + inputs_per_vector(values) - 1) / inputs_per_vector(values); }
    int padded_rows() const { return num_panels() * kPanelRows; }

    std::size_t panel_offset(int panel) const {
        return storage == Storage::sparse ? offsets[panel]
                                          : std::size_t(panel) * num_vectors() * kVectorBytes;
    }
    std::size_t panel_bytes(int begin, int end) const { return panel_offset(end) - panel_offset(begin); }
    const std::uint8_t* panel(int index) const { return data + panel_offset(index); }

    // File bytes that one product with this matrix touches.
    std::size_t bytes() const {
        std::size_t total = panel_bytes(0, num_panels());
        if (values == Values::i8) total += std::size_t(padded_rows()) * 8;
        if (storage == Storage::sparse) total += (std::size_t(num_panels()) + 1) * 8;
        return total;
    }
};

// Inputs x_TK of a product in blocks of 8 tokens (the last may have fewer): f32 as [block][K][token], i8 as
// [block][K / 4][token][4], K padded to 4, so that one vector's inputs of all tokens of a block lie together.
struct Activations {
    int num_tokens = 0;
    int padded_columns = 0;
    const float* x = nullptr;         // for f32 and bf16 weights
    const std::uint8_t* q = nullptr;  // for i8 weights: q + 128
    const float* scale = nullptr;     // [T] of q

    static int padded(int columns) { return int(round_up(std::size_t(columns), 4)); }
    int block_tokens(int first) const {
        return num_tokens - first < kTokenBlock ? num_tokens - first : kTokenBlock;
    }
    const float* x_block(int first) const { return x + std::size_t(first) * padded_columns; }
    const std::uint8_t* q_block(int first) const { return q + std::size_t(first) * padded_columns; }
};

}  // namespace gossamer
