// What everything native speaks of: types of numbers, panels of weights, blocks of activations, and the
// errors of the Python side.
//
// A panel is 16 output rows; a vector is 64 bytes of it, 16 rows x I consecutive inputs in the order
// [row][input] (I = 1 for f32, 2 for bf16, 4 for i8). docs/format.md has the whole layout.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <iterator>
#include <stdexcept>
#include <string>

namespace gossamer {

constexpr int kPanelRows = 16;
constexpr int kVectorBytes = 64;
constexpr int kGroupVectors = 16;  // vectors whose masks lie together in a sparse stream
constexpr int kScaleVectors = 32;  // i4: vectors (128 inputs) of a row that share a multiplier
constexpr std::size_t kSlackBytes = 64;

// A strip of a panel of blocks: 64 blocks of 4 inputs, as many inputs as 64 vectors of i8 have.
constexpr int kStripBlocks = 64, kBlockBytes = 4, kStripVectors = 64;

enum class Storage { dense, sparse, blocks };
constexpr const char* kStorageNames[] = {"dense", "sparse", "blocks"};
constexpr int kNumStorages = std::size(kStorageNames);
enum class Values { f32, bf16, i8, i4 };

// Raised as gossamer.errors.<same name> (python/bindings.cpp).
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

// What there is to know of a type of weights.
struct NumberType {
    const char* name;
    const char* dtype;      // of a dense tensor in the file
    int bits;               // of a weight; i4 is two to a byte
    int inputs_per_vector;  // I: a vector is 16 rows x I inputs
    int largest;            // magnitude of an integer; 0: the type has fractions
};

// In the order of Values.
inline constexpr NumberType kNumberTypes[] = {
    {"f32", "F32", 32, 1, 0},
    {"bf16", "BF16", 16, 2, 0},
    {"i8", "I8", 8, 4, 128},
    {"i4", "U8", 4, 4, 8},
};
constexpr int kNumValues = std::size(kNumberTypes);

constexpr const NumberType& type_of(Values values) { return kNumberTypes[int(values)]; }
constexpr const char* name(Values values) { return type_of(values).name; }
constexpr bool is_integer(Values values) { return type_of(values).largest != 0; }
constexpr int inputs_per_vector(Values values) { return type_of(values).inputs_per_vector; }

// Of a stored weight in a sparse stream, where a pair of i4 vectors shares its bytes.
constexpr int bytes_per_value(Values values) { return (type_of(values).bits + 7) / 8; }

// Of a vector's mask, which has a bit for each of its weights.
constexpr int bytes_per_mask(Values values) { return kPanelRows * inputs_per_vector(values) / 8; }

// The type of that name; FormatError when there is none.
inline Values parse_values(const std::string& name) {
    std::string expected;
    for (int i = 0; i < kNumValues; ++i) {
        if (name == kNumberTypes[i].name) return Values(i);
        expected += (i == 0 ? "" : i + 1 < kNumValues ? ", " : " or ") + std::string(kNumberTypes[i].name);
    }
    throw FormatError("found values '" + name + "'; expected " + expected);
}

// One weight matrix w_NK, validated, in the mapped file.
struct Linear {
    Storage storage = Storage::dense;
    Values values = Values::f32;
    int rows = 0;                               // N
    int columns = 0;                            // K
    const std::uint8_t* data = nullptr;         // dense panels, or the stream
    const std::uint64_t* offsets = nullptr;     // of a stream: where each panel begins in it, and its end
    const float* scale = nullptr;               // i8, i4: [N padded to 16]
    const std::int32_t* sum = nullptr;          // i8, i4: [N padded to 16], sums over K of the int8 weights
    const std::uint8_t* multipliers = nullptr;  // i4: [panel][K / 128][16], int8 weight = int4 value x this

    int num_panels() const { return (rows + kPanelRows - 1) / kPanelRows; }
    int num_vectors() const { return (columns + inputs_per_vector(values) - 1) / inputs_per_vector(values); }
    int num_strips() const { return (num_vectors() + kStripVectors - 1) / kStripVectors; }
    int num_scale_groups() const { return (num_vectors() + kScaleVectors - 1) / kScaleVectors; }
    int padded_rows() const { return num_panels() * kPanelRows; }

    std::size_t panel_offset(int panel) const {
        if (storage != Storage::dense) return offsets[panel];
        const int stored = values == Values::i4 ? (num_vectors() + 1) / 2 : num_vectors();
        return std::size_t(panel) * stored * kVectorBytes;
    }
    std::size_t panel_bytes(int begin, int end) const { return panel_offset(end) - panel_offset(begin); }
    const std::uint8_t* panel(int index) const { return data + panel_offset(index); }
    // Those of a panel's vectors from `vector` (a multiple of 32) on; nullptr unless i4.
    const std::uint8_t* panel_multipliers(int index, int vector) const {
        if (multipliers == nullptr) return nullptr;
        const std::size_t group = std::size_t(index) * num_scale_groups() + vector / kScaleVectors;
        return multipliers + group * kPanelRows;
    }

    // The rows of the panels from `panel` on.
    Linear from(int panel) const {
        Linear rest = *this;
        rest.rows -= panel * kPanelRows;
        if (storage != Storage::dense)
            rest.offsets += panel;
        else
            rest.data = this->panel(panel);
        if (scale != nullptr) rest.scale += panel * kPanelRows;
        if (sum != nullptr) rest.sum += panel * kPanelRows;
        rest.multipliers = panel_multipliers(panel, 0);
        return rest;
    }

    // File bytes that one product with this matrix touches.
    std::size_t bytes() const {
        std::size_t total = panel_bytes(0, num_panels());
        if (is_integer(values)) total += std::size_t(padded_rows()) * 8;
        if (values == Values::i4) total += std::size_t(padded_rows()) * num_scale_groups();
        if (storage != Storage::dense) total += (std::size_t(num_panels()) + 1) * 8;
        return total;
    }
};

// Inputs x_TK of a product, rows `stride` apart. Past column K a row is readable for a vector, and zero (q:
// 128) as far as weights are stored.
struct Activations {
    int num_tokens = 0;
    std::size_t stride = 0;
    const float* x = nullptr;               // for f32 and bf16 weights
    const std::uint8_t* q = nullptr;        // for i8 and i4 weights: q + 128
    const std::uint8_t* q_block = nullptr;  // the same of up to 16 tokens as [K / 4][token][4]: one stream
    const float* scale = nullptr;           // [T] of q
    const std::uint16_t* high = nullptr;    // for bf16 weights by bf16 products: the nearest bf16, and (amx)
    const std::uint16_t* low = nullptr;     // that of what it leaves out

    static constexpr int kBlockTokens = 16;

    // Puts a row of q into its places in the block of `tokens`.
    static void interleave(const std::uint8_t* q_K, int columns, int token, int tokens, std::uint8_t* block) {
        for (int k = 0; k < columns; k += 4) std::memcpy(block + k * tokens + 4 * token, q_K + k, 4);
    }

    // Room for K inputs: whole tile rows, and no power of two, which would put all rows into one cache set.
    static constexpr std::size_t padded(int columns) { return round_up(std::size_t(columns), 64) + 64; }
};

// T rows of activations, `stride` apart, that a kernel walks down together: a pointer for each 3 rows, since
// an address may be pointer + 1 or 2 strides. T pointers would not fit the registers.
template <class T, int kRows>
struct RowPointers {
    const T* third[(kRows + 2) / 3];
    std::size_t stride;

    RowPointers(const T* first, std::size_t row_stride) : stride(row_stride) {
        for (int i = 0; i < (kRows + 2) / 3; ++i) third[i] = first + 3 * i * row_stride;
    }
    const T* row(int t) const { return third[t / 3] + t % 3 * stride; }
    void advance(int count) {
        for (const T*& pointer : third) pointer += count;
    }
};

}  // namespace gossamer
