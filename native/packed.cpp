#include "packed.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "kernels/table.hpp"

namespace gossamer {
namespace {

constexpr int kMaxExtent = 1 << 24;     // keeps every byte count below 2^64
constexpr int kMaxInt8Columns = 65536;  // 65536 * 255 * 128 < 2^31

std::string shape_text(const std::vector<std::size_t>& shape) {
    std::string text = "[";
    for (std::size_t i = 0; i < shape.size(); ++i) text += (i ? ", " : "") + std::to_string(shape[i]);
    return text + "]";
}

// One row and one column past the matrix must hold zeros: which bits of a vector lie inside it.
std::uint64_t inside_mask(const Linear& w, int panel, int vector) {
    const int rows = std::min(kPanelRows, w.rows - panel * kPanelRows);
    const int inputs = std::min(4, w.columns - vector * 4);
    const std::uint64_t row = (std::uint64_t(1) << inputs) - 1;
    std::uint64_t mask = 0;
    for (int r = 0; r < rows; ++r) mask |= row << (4 * r);
    return mask;
}

// What is wrong with a sparse panel, or nullptr. Reads only between the panel's offsets.
const char* check_sparse_panel(const Linear& w, int panel) {
    const std::uint8_t* position = w.panel(panel);
    const std::uint8_t* end = w.data + w.offsets[panel + 1];
    const std::uint64_t inside = inside_mask(w, panel, 0),
                        last_inside = inside_mask(w, panel, w.num_vectors() - 1);
    for (int first = 0; first < w.num_vectors(); first += kGroupVectors) {
        const int count = std::min(kGroupVectors, w.num_vectors() - first);
        if (end - position < 8 * count) return "its masks lie outside their panel";
        std::ptrdiff_t population = 0;
        for (int v = 0; v < count; ++v) {
            std::uint64_t mask;
            std::memcpy(&mask, position + 8 * v, sizeof mask);
            const bool last = first + v == w.num_vectors() - 1;
            if (mask & ~(last ? inside & last_inside : inside))
                return "a mask has weights outside the matrix";
            population += std::popcount(mask);
        }
        position += 8 * count;
        if (end - position < population) return "its masks announce more values than the panel holds";
        if (population && std::memchr(position, 0, std::size_t(population)))
            return "a mask announces a weight that is 0";
        position += population;
    }
    return position == end ? nullptr : "its masks announce fewer values than the panel holds";
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
    const int rows = std::min(kPanelRows, w.rows - panel * kPanelRows);
    const int inputs = inputs_per_vector(w.values), width = 4 / inputs;
    for (int v = rows == kPanelRows ? w.num_vectors() - 1 : 0; v < w.num_vectors(); ++v) {
        const std::uint8_t* vector = w.panel(panel) + std::size_t(v) * kVectorBytes;
        for (int byte = 0; byte < kVectorBytes; ++byte) {
            const int row = byte / 4, column = v * inputs + byte % 4 / width;
            if (vector[byte] && (row >= rows || column >= w.columns))
                return "it has weights outside the matrix";
        }
    }
    if (w.values == Values::i8) return nullptr;
    const std::uint32_t exponent = w.values == Values::f32 ? 0x7F800000u : 0x7F80u;
    return has_special(w.panel(panel), std::size_t(w.num_vectors()) * kVectorBytes, exponent)
               ? "it has weights that are NaN or infinite"
               : nullptr;
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
    const Activations x{.num_tokens = 1, .padded_columns = int(ones.size()), .q = ones.data()};
    std::int32_t acc[kPanelRows];
    const MatmulRow& row = find_matmul(w.storage, w.values, isa());
    row.accumulate(w, panel, panel + 1, x, acc - panel * kPanelRows, 0);
    for (int r = 0; r < kPanelRows; ++r) {
        if (acc[r] + 128 * stored[r] != stored[r]) return "its row sums are not the sums of its weights";
    }
    return nullptr;
}

const char* check_panel(const Linear& w, int panel, const std::vector<std::uint8_t>& ones) {
    const bool sparse = w.storage == Storage::sparse;
    if (const char* found = sparse ? check_sparse_panel(w, panel) : check_dense_panel(w, panel)) return found;
    if (w.values != Values::i8) return nullptr;
    if (const char* found = check_scales(w, panel)) return found;
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
    const auto found = layers.find(name);
    if (found == layers.end())
        throw FormatError("no matrix " + name + "; the file is damaged, pack the model again");
    const LayerEntry& entry = found->second;
    Linear w{.storage = entry.storage, .values = entry.values, .rows = entry.rows, .columns = entry.columns};
    if (w.rows < 1 || w.columns < 1 || w.rows > kMaxExtent || w.columns > kMaxExtent) {
        throw FormatError(name + ": found " + std::to_string(w.rows) + " x " + std::to_string(w.columns) +
                          " weights; expected 1 .. 2^24 of each");
    }
    find_matmul(w.storage, w.values, Isa::scalar);
    const std::size_t panels = w.num_panels(), vectors = w.num_vectors();
    if (w.values == Values::i8) {
        if (w.columns > kMaxInt8Columns)
            throw UnsupportedError(name + ": more than 65536 inputs overflow int32 sums");
        const std::size_t rows = w.padded_rows();
        w.scale = reinterpret_cast<const float*>(tensor(name + ".weight_scale", "F32", {rows}));
        w.sum = reinterpret_cast<const std::int32_t*>(tensor(name + ".weight_sum", "I32", {rows}));
    }
    if (w.storage == Storage::dense) {
        const char* dtype = w.values == Values::f32 ? "F32" : w.values == Values::bf16 ? "BF16" : "I8";
        const std::size_t inputs = inputs_per_vector(w.values);
        w.data = tensor(name + ".weight", dtype, {panels, vectors, std::size_t(kPanelRows), inputs});
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

const float* Packed::vector(const std::string& name, int count) const {
    const std::size_t padded = round_up(std::size_t(count), 16);
    const auto* numbers = reinterpret_cast<const float*>(tensor(name, "F32", {padded}));
    if (!std::all_of(numbers, numbers + padded, [](float number) { return std::isfinite(number); })) {
        throw FormatError(name + ": found NaN or infinity; the file is damaged, pack the model again");
    }
    return numbers;
}

Storage parse_storage(const std::string& name) {
    if (name == "dense") return Storage::dense;
    if (name == "sparse") return Storage::sparse;
    throw FormatError("found storage '" + name + "'; expected dense or sparse");
}

Values parse_values(const std::string& name) {
    if (name == "f32") return Values::f32;
    if (name == "bf16") return Values::bf16;
    if (name == "i8") return Values::i8;
    throw FormatError("found values '" + name + "'; expected f32, bf16 or i8");
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
    const std::vector<std::uint8_t> ones(round_up(std::size_t(columns), 4), 1);
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
