#include "engine/packed.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/table.hpp"

namespace gossamer {
namespace {

constexpr int kMaxExtent = 1 << 24;        // keeps every byte count below 2^64
constexpr int kMaxIntegerColumns = 65536;  // 65536 * 255 * 128 < 2^31

std::string shape_text(const std::vector<std::size_t>& shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

// Which weights of a vector lie inside the matrix: a bit each, as in a stream's masks.
std::uint64_t inside_mask(const Linear& w, int panel, int vector) {
    const int per_vector = inputs_per_vector(w.values);
    const int rows = std::min(kPanelRows, w.rows - panel * kPanelRows);
    const int inputs = std::min(per_vector, w.columns - vector * per_vector);
    const std::uint64_t row = (std::uint64_t(1) << inputs) - 1;
    std::uint64_t mask = 0;
    for (int r = 0; r < rows; ++r) mask |= row << (per_vector * r);
    return mask;
}

std::uint64_t mask_at(const Linear& w, const std::uint8_t* masks, int vector) {
    std::uint64_t mask = 0;
    std::memcpy(&mask, masks + vector * bytes_per_mask(w.values), bytes_per_mask(w.values));
    return mask;
}

// Whether one of `count` packed values is 0 (-0.0 counts), or not finite.
bool has_bad_value(Values values, const std::uint8_t* packed, std::ptrdiff_t count) {
    if (values == Values::i8) return count && std::memchr(packed, 0, std::size_t(count));
    for (std::ptrdiff_t i = 0; i < count; ++i) {
        std::uint32_t bits = 0;
        const int width = bytes_per_value(values);
        std::memcpy(reinterpret_cast<std::uint8_t*>(&bits) + 4 - width, packed + i * width, width);
        if ((bits & 0x7FFFFFFFu) == 0 || (bits & 0x7F800000u) == 0x7F800000u) return true;
    }
    return false;
}

// Whether the nibbles of a pair are weights (not 0) up to each vector's count, and 0 from there on.
bool is_sound_pair(const std::uint8_t* bytes, int first, int second) {
    for (int i = 0; i < std::max(first, second); ++i) {
        if ((bytes[i] % 16 != 0) != (i < first) || (bytes[i] / 16 != 0) != (i < second)) return false;
    }
    return true;
}

// What is wrong with the values of a group, or nullptr; moves past them.
const char* check_values(const Linear& w, const std::uint8_t* masks, int count, const std::uint8_t*& position,
                         const std::uint8_t* end) {
    const int step = w.values == Values::i4 ? 2 : 1;
    for (int v = 0; v < count; v += step) {
        const int first = std::popcount(mask_at(w, masks, v));
        const int second = step == 2 && v + 1 < count ? std::popcount(mask_at(w, masks, v + 1)) : 0;
        const std::ptrdiff_t num_bytes = std::ptrdiff_t(std::max(first, second)) * bytes_per_value(w.values);
        if (end - position < num_bytes) return "its masks announce more values than the panel holds";
        if (w.values == Values::i4 ? !is_sound_pair(position, first, second)
                                   : has_bad_value(w.values, position, first))
            return "a mask announces a weight that is 0 or not finite";
        position += num_bytes;
    }
    return nullptr;
}

// What is wrong with a sparse panel, or nullptr. Reads only between the panel's offsets.
const char* check_sparse_panel(const Linear& w, int panel) {
    const std::uint8_t* position = w.panel(panel);
    const std::uint8_t* end = w.data + w.offsets[panel + 1];
    const std::uint64_t inside = inside_mask(w, panel, 0),
                        last_inside = inside_mask(w, panel, w.num_vectors() - 1);
    for (int first = 0; first < w.num_vectors(); first += kGroupVectors) {
        const int count = std::min(kGroupVectors, w.num_vectors() - first);
        const std::uint8_t* masks = position;
        position += count * bytes_per_mask(w.values);
        if (position > end) return "its masks lie outside their panel";
        for (int v = 0; v < count; ++v) {
            const bool last = first + v == w.num_vectors() - 1;
            if (mask_at(w, masks, v) & ~(last ? inside & last_inside : inside))
                return "a mask has weights outside the matrix";
        }
        if (const char* found = check_values(w, masks, count, position, end)) return found;
    }
    return position == end ? nullptr : "its masks announce fewer values than the panel holds";
}

// What is wrong with a panel of blocks, or nullptr. Reads only between the panel's offsets.
const char* check_blocks_panel(const Linear& w, int panel) {
    const std::uint8_t* position = w.panel(panel);
    const std::uint8_t* end = w.data + w.offsets[panel + 1];
    const int last_inputs = (w.columns - 1) % kBlockBytes + 1;  // of the last block of a row
    for (int first = 0; first < w.num_vectors(); first += kStripVectors) {
        const int inside = std::min(kStripBlocks, w.num_vectors() - first);  // blocks of a row
        const std::uint8_t* masks = position;
        position += kPanelRows * sizeof(std::uint64_t);
        if (position > end) return "its masks lie outside their panel";
        for (int row = 0; row < kPanelRows; ++row) {
            std::uint64_t mask;
            std::memcpy(&mask, masks + row * sizeof mask, sizeof mask);
            const bool is_row = panel * kPanelRows + row < w.rows;
            if (mask != 0 && (!is_row || std::bit_width(mask) > inside))
                return "a mask has blocks outside the matrix";
            for (; mask != 0; mask &= mask - 1, position += kBlockBytes) {
                if (end - position < kBlockBytes)
                    return "its masks announce more blocks than the panel holds";
                std::uint32_t weights;
                std::memcpy(&weights, position, sizeof weights);
                if (weights == 0) return "a mask announces a block that is 0";
                const bool is_last = first + std::countr_zero(mask) == w.num_vectors() - 1;
                if (is_last && last_inputs < kBlockBytes && weights >> (8 * last_inputs) != 0)
                    return "a block has weights outside the matrix";
            }
        }
    }
    return position == end ? nullptr : "its masks announce fewer blocks than the panel holds";
}

// Whether an exponent of all ones occurs in float32 words, or in either half of them (bfloat16).
bool has_special(const std::uint8_t* weights, std::size_t num_bytes, std::uint32_t exponent) {
    const std::uint32_t high = exponent == 0x7F80u ? exponent << 16 : exponent;
    std::uint32_t special = 0;
    for (std::size_t i = 0; i < num_bytes; i += sizeof(std::uint32_t)) {
        std::uint32_t word;
        std::memcpy(&word, weights + i, sizeof word);
        special |= std::uint32_t((word & exponent) == exponent) | std::uint32_t((word & high) == high);
    }
    return special != 0;
}

const char* check_dense_panel(const Linear& w, int panel) {
    const int inputs = inputs_per_vector(w.values), weight_bytes = 4 / inputs;
    const int per_line = w.values == Values::i4 ? 2 : 1;  // vectors in 64 bytes
    const int vectors = int(round_up(w.num_vectors(), per_line));
    const bool full = w.rows - panel * kPanelRows >= kPanelRows;
    for (int v = full ? vectors - per_line : 0; v < vectors; ++v) {
        const std::uint8_t* line = w.panel(panel) + std::size_t(v / per_line) * kVectorBytes;
        for (int byte = 0; byte < kVectorBytes; ++byte) {
            const int row = panel * kPanelRows + byte / 4, column = v * inputs + byte % 4 / weight_bytes;
            const int bits = per_line == 1 ? line[byte] : v % 2 ? line[byte] / 16 : line[byte] % 16;
            if (bits && (row >= w.rows || column >= w.columns)) return "it has weights outside the matrix";
        }
    }
    if (is_integer(w.values)) return nullptr;
    const std::uint32_t exponent = w.values == Values::f32 ? 0x7F800000u : 0x7F80u;
    return has_special(w.panel(panel), std::size_t(w.num_vectors()) * kVectorBytes, exponent)
               ? "it has weights that are NaN or infinite"
               : nullptr;
}

const char* check_multipliers(const Linear& w, int panel) {
    const std::uint8_t* multipliers = w.panel_multipliers(panel, 0);
    for (int i = 0; i < w.num_scale_groups() * kPanelRows; ++i) {
        const bool inside = panel * kPanelRows + i % kPanelRows < w.rows;
        if (inside ? multipliers[i] < 1 || multipliers[i] > 16 : multipliers[i] != 0)
            return "its multipliers must be 1 .. 16, and 0 in the padding";
    }
    return nullptr;
}

const char* check_scales(const Linear& w, int panel) {
    for (int row = 0; row < kPanelRows; ++row) {
        const int n = panel * kPanelRows + row;
        if (!std::isfinite(w.scale[n]) || w.scale[n] < 0) return "its scales must be finite and not negative";
        if (n >= w.rows && w.scale[n] != 0) return "its scales must be 0 in the padding";
    }
    return nullptr;
}

// The sums of the weights themselves, by the product with inputs that are all 1.
const char* check_sums(const Linear& w, int panel, const std::vector<std::uint8_t>& ones) {
    const std::int32_t* stored = w.sum + panel * kPanelRows;
    for (int r = 0; r < kPanelRows; ++r) {
        if (std::abs(std::int64_t(stored[r])) > std::int64_t(128) * w.columns)
            return "its row sums are out of range";
    }
    const Activations x{.num_tokens = 1, .stride = ones.size(), .q = ones.data(), .q_block = ones.data()};
    std::int32_t acc[kPanelRows];
    const MatmulKernels& kernels = find_matmul(w.storage, w.values, isa());
    kernels.accumulate(w, panel, panel + 1, x, acc - panel * kPanelRows, 0);
    for (int r = 0; r < kPanelRows; ++r) {
        if (acc[r] + 128 * stored[r] != stored[r]) return "its row sums are not the sums of its weights";
    }
    return nullptr;
}

const char* check_panel(const Linear& w, int panel, const std::vector<std::uint8_t>& ones) {
    const auto check = w.storage == Storage::sparse   ? check_sparse_panel
                       : w.storage == Storage::blocks ? check_blocks_panel
                                                      : check_dense_panel;
    if (const char* found = check(w, panel)) return found;
    if (!is_integer(w.values)) return nullptr;
    if (const char* found = check_scales(w, panel)) return found;
    if (w.values == Values::i4) {
        if (const char* found = check_multipliers(w, panel)) return found;
    }
    return check_sums(w, panel, ones);
}

void check_offsets(const std::string& name, const Linear& w, std::size_t count, std::size_t stream_bytes) {
    const std::size_t panels = w.num_panels();
    bool sound = w.offsets[0] == 0 && w.offsets[panels] + kSlackBytes <= stream_bytes;
    for (std::size_t i = 1; i < count; ++i) sound = sound && w.offsets[i] >= w.offsets[i - 1];
    for (std::size_t i = panels; i < count; ++i) sound = sound && w.offsets[i] == w.offsets[panels];
    if (!sound || w.offsets[panels] > stream_bytes) {
        throw FormatError(name + ": panel offsets must start at 0, never fall, and leave 64 bytes of " +
                          std::to_string(stream_bytes) + " free; the file is damaged, pack the model again");
    }
    const std::uint8_t* slack = w.data + w.offsets[panels];
    if (std::any_of(slack, w.data + stream_bytes, [](std::uint8_t byte) { return byte != 0; })) {
        throw FormatError(name + ": found bytes after the last panel; expected zeros (pack the model again)");
    }
}

}  // namespace

const std::uint8_t* Packed::tensor(const std::string& name, const char* dtype,
                                   std::vector<std::size_t> shape) const {
    const auto found = tensors.find(name);
    if (found == tensors.end())
        throw FormatError("no tensor " + name + "; the file is damaged, pack the model again");
    const Tensor& tensor = found->second;
    if (tensor.dtype != dtype || tensor.shape != shape) {
        throw FormatError(name + ": found " + tensor.dtype + " " + shape_text(tensor.shape) + "; expected " +
                          dtype + " " + shape_text(shape));
    }
    const std::string_view type = tensor.dtype;
    std::size_t expected = type == "U64" ? 8 : type == "F32" || type == "I32" ? 4 : type == "BF16" ? 2 : 1;
    for (std::size_t extent : shape) expected *= extent;
    const bool inside = tensor.offset <= num_bytes && tensor.num_bytes <= num_bytes - tensor.offset;
    if (tensor.num_bytes != expected || !inside || tensor.offset % 64 != 0) {
        throw FormatError(name + ": found bytes " + std::to_string(tensor.offset) + " + " +
                          std::to_string(tensor.num_bytes) + "; expected " + std::to_string(expected) +
                          " at a multiple of 64 inside the file's " + std::to_string(num_bytes));
    }
    return data + tensor.offset;
}

Linear Packed::linear(const std::string& name) const {
    const auto found = matrices.find(name);
    if (found == matrices.end())
        throw FormatError("no matrix " + name + "; the file is damaged, pack the model again");
    const MatrixEntry& entry = found->second;
    Linear w{.storage = entry.storage, .values = entry.values, .rows = entry.rows, .columns = entry.columns};
    if (w.rows < 1 || w.columns < 1 || w.rows > kMaxExtent || w.columns > kMaxExtent) {
        throw FormatError(name + ": found " + std::to_string(w.rows) + " x " + std::to_string(w.columns) +
                          " weights; expected 1 .. 2^24 of each");
    }
    if (w.storage == Storage::blocks && w.values != Values::i8)
        throw FormatError(name + ": found blocks of " + gossamer::name(w.values) + "; expected i8");
    const std::size_t panels = w.num_panels(), vectors = w.num_vectors();
    if (is_integer(w.values)) {
        if (w.columns > kMaxIntegerColumns)
            throw UnsupportedError(name + ": more than 65536 inputs overflow int32 sums");
        const std::size_t rows = w.padded_rows();
        w.scale = reinterpret_cast<const float*>(tensor(name + ".weight_scale", "F32", {rows}));
        w.sum = reinterpret_cast<const std::int32_t*>(tensor(name + ".weight_sum", "I32", {rows}));
    }
    if (w.values == Values::i4) {
        const std::size_t count = panels * w.num_scale_groups() * kPanelRows;
        const std::size_t padded = round_up(count, 64);
        w.multipliers = tensor(name + ".weight_multiplier", "U8", {padded});
        if (std::any_of(w.multipliers + count, w.multipliers + padded, [](auto byte) { return byte != 0; }))
            throw FormatError(name + ": found multipliers past the last panel; expected zeros");
    }
    if (w.storage == Storage::dense && w.values == Values::i4) {
        w.data = tensor(name + ".weight", "U8", {panels, (vectors + 1) / 2, std::size_t(kPanelRows), 4});
        return w;
    }
    if (w.storage == Storage::dense) {
        const std::size_t inputs = inputs_per_vector(w.values);
        w.data = tensor(name + ".weight", type_of(w.values).dtype,
                        {panels, vectors, std::size_t(kPanelRows), inputs});
        return w;
    }
    const std::string stream = name + ".weight.stream";
    const auto stream_tensor = tensors.find(stream);
    const std::size_t stream_bytes = stream_tensor == tensors.end() ? 0 : stream_tensor->second.num_bytes;
    w.data = tensor(stream, "U8", {stream_bytes});
    const std::size_t count = round_up(panels + 1, 8);
    w.offsets = reinterpret_cast<const std::uint64_t*>(tensor(name + ".weight.offsets", "U64", {count}));
    check_offsets(name, w, count, stream_bytes);
    return w;
}

const float* Packed::vector(const std::string& name, std::size_t count) const {
    const std::size_t padded = round_up(count, 16);
    const auto* numbers = reinterpret_cast<const float*>(tensor(name, "F32", {padded}));
    if (!std::all_of(numbers, numbers + padded, [](float number) { return std::isfinite(number); })) {
        throw FormatError(name + ": found NaN or infinity; the file is damaged, pack the model again");
    }
    return numbers;
}

Storage parse_storage(const std::string& name) {
    for (int i = 0; i < kNumStorages; ++i) {
        if (name == kStorageNames[i]) return Storage(i);
    }
    throw FormatError("found storage '" + name + "'; expected dense, sparse or blocks");
}

void check_contents(const std::vector<std::pair<std::string, Linear>>& linears, ThreadPool& pool) {
    struct Damage {
        std::size_t linear;
        int panel;
        const char* what;
    };
    std::vector<Damage> found(std::size_t(pool.size()), Damage{linears.size(), 0, nullptr});
    int columns = 0;
    for (const auto& [name, w] : linears) columns = std::max(columns, w.columns);
    const std::vector<std::uint8_t> ones(Activations::padded(columns), 1);
    pool.run([&](int thread) {
        for (std::size_t i = 0; i < linears.size() && found[thread].what == nullptr; ++i) {
            const Linear& w = linears[i].second;
            const Part part(w.num_panels(), thread, pool.size());
            for (int panel = part.begin; panel < part.end; ++panel) {
                const char* what = check_panel(w, panel, ones);
                if (what == nullptr) continue;
                found[thread] = {i, panel, what};
                break;
            }
        }
    });
    const auto first = std::min_element(found.begin(), found.end(),
                                        [](const Damage& a, const Damage& b) { return a.linear < b.linear; });
    if (first->what == nullptr) return;
    throw FormatError(linears[first->linear].first + ": panel " + std::to_string(first->panel) + ": " +
                      first->what + "; the file is damaged, pack the model again");
}

}  // namespace gossamer
