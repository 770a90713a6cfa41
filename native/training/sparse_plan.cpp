#include "training/sparse_plan.hpp"

#include <algorithm>
#include <cstring>

namespace gossamer {
namespace {

constexpr int kRowTilesAtOnce = 16;  // sums of 1536 rows x 64 tokens (384 KB) stay in L2

std::size_t tile_floats(int count) { return std::size_t(count) * kStripInputs * kTileTokens; }

// Four numbers in a register, on every kind of processor.
using Four [[gnu::vector_size(16)]] = float;

inline Four load(const float* from) {
    Four x;
    std::memcpy(&x, from, sizeof x);
    return x;
}
inline void store(float* to, Four x) { std::memcpy(to, &x, sizeof x); }

// to[c * to_stride + r] = from[r * from_stride + c] for 4 x 4 numbers.
inline void transpose4(const float* from, std::size_t from_stride, float* to, std::size_t to_stride) {
    const Four a = load(from), b = load(from + from_stride);
    const Four c = load(from + 2 * from_stride), d = load(from + 3 * from_stride);
    const Four ab_low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
    const Four cd_low = __builtin_shufflevector(c, d, 0, 4, 1, 5);
    const Four ab_high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four cd_high = __builtin_shufflevector(c, d, 2, 6, 3, 7);
    store(to, __builtin_shufflevector(ab_low, cd_low, 0, 1, 4, 5));
    store(to + to_stride, __builtin_shufflevector(ab_low, cd_low, 2, 3, 6, 7));
    store(to + 2 * to_stride, __builtin_shufflevector(ab_high, cd_high, 0, 1, 4, 5));
    store(to + 3 * to_stride, __builtin_shufflevector(ab_high, cd_high, 2, 3, 6, 7));
}

// to[c * to_stride + r] = from[r * from_stride + c]. The 64 x 64 numbers of a tile's side (16 KB) stay in L1;
// the other side's lines lie far apart, often in one set of the cache, so four at a time are used up.
template <bool kFromTile>
void transpose(const float* from, std::size_t from_stride, int rows, int columns, float* to,
               std::size_t to_stride) {
    const int whole_rows = rows & ~3, whole_columns = columns & ~3;
    const int outer = kFromTile ? whole_columns : whole_rows, inner = kFromTile ? whole_rows : whole_columns;
    for (int block = 0; block < inner; block += 64) {
        for (int i = 0; i < outer; i += 4) {
            for (int j = block; j < std::min(block + 64, inner); j += 4) {
                const int r = kFromTile ? j : i, c = kFromTile ? i : j;
                transpose4(from + r * from_stride + c, from_stride, to + c * to_stride + r, to_stride);
            }
        }
    }
    for (int r = 0; r < rows; ++r) {
        for (int c = r < whole_rows ? whole_columns : 0; c < columns; ++c)
            to[c * to_stride + r] = from[r * from_stride + c];
    }
}

// Rows of tokens as a matrix.
struct Tokens {
    const float* data;
    int num_tokens, width;

    int num_tiles() const { return (num_tokens + kTileTokens - 1) / kTileTokens; }

    // Columns [begin, end) of a tile of 64 tokens, tokens contiguous; tokens behind the last are 0.
    void pack(int tile, int begin, int end, float* to) const {
        const int first = tile * kTileTokens, count = std::min(kTileTokens, num_tokens - first);
        if (count < kTileTokens) std::fill_n(to, std::size_t(end - begin) * kTileTokens, 0.0f);
        transpose<false>(data + std::size_t(first) * width + begin, width, count, end - begin, to,
                         kTileTokens);
    }
};

// out_TO = in_TI M^T for the masked matrix M [O, I] that `order` describes.
void multiply(Workspace& work, const TrainingKernels& kernels, const StripOrder& order, const float* values,
              const Tokens& in, float* out_TO) {
    if (in.num_tokens == 0) return;
    const int num_threads = work.team.size(), row_tiles = order.num_row_tiles();
    // Rows are split as far as it takes to give every thread a few pieces.
    const int wanted = (4 * num_threads + in.num_tiles() - 1) / in.num_tiles();
    const int tiles_at_once = std::clamp(row_tiles / wanted, 1, kRowTilesAtOnce);
    const int chunks = (row_tiles + tiles_at_once - 1) / tiles_at_once;
    work.reserve(tile_floats(order.num_strips() + tiles_at_once));
    work.team.run([&](int thread) {
        float* packed = work.owned(thread);
        float* sums = packed + tile_floats(order.num_strips());
        const Part pieces(in.num_tiles() * chunks, thread, num_threads);
        for (int piece = pieces.begin, previous = -1; piece < pieces.end; ++piece) {
            const int tile = piece / chunks, row_tile = piece % chunks * tiles_at_once;
            if (tile != previous) in.pack(tile, 0, order.inputs, packed);
            previous = tile;
            const int row = row_tile * kStripInputs;
            const int rows = std::min(tiles_at_once * kStripInputs, order.rows - row);
            std::fill_n(sums, std::size_t(rows) * kTileTokens, 0.0f);
            for (int s = 0; s < order.num_strips(); ++s)
                kernels.multiply(order.strip(values, s, row_tile, rows), packed + tile_floats(s), sums);
            const int first = tile * kTileTokens, count = std::min(kTileTokens, in.num_tokens - first);
            transpose<true>(sums, kTileTokens, rows, count, out_TO + std::size_t(first) * order.rows + row,
                            order.rows);
        }
    });
}

}  // namespace

void Workspace::reserve(std::size_t floats_a_thread, std::size_t shared_floats) {
    const auto grow = [](std::vector<float>& memory, std::size_t count) {
        if (memory.size() < count + 16) memory = std::vector<float>(count + 16);
    };
    for (std::vector<float>& memory : owned_) grow(memory, floats_a_thread);
    grow(shared_, shared_floats);
}

float* Workspace::aligned(std::vector<float>& memory) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory.data());
    return memory.data() + (64 - address % 64) % 64 / sizeof(float);
}

SparsePlan::SparsePlan(const bool* mask_NK, int rows, int columns) {
    forward_ = {.rows = rows, .inputs = columns};
    forward_.counts.reserve(std::size_t(rows) * forward_.num_strips());
    for (int s = 0; s < forward_.num_strips(); ++s) {
        const int begin = s * kStripInputs, end = std::min(begin + kStripInputs, columns);
        for (int n = 0; n < rows; ++n) {
            if (n % kStripInputs == 0) forward_.tile_begin.push_back(forward_.index.size());
            const std::size_t before = forward_.index.size();
            for (int k = begin; k < end; ++k) {
                if (mask_NK[std::size_t(n) * columns + k]) forward_.index.push_back(std::uint8_t(k - begin));
            }
            forward_.counts.push_back(std::uint8_t(forward_.index.size() - before));
        }
    }
    forward_.tile_begin.push_back(forward_.index.size());
    transpose();
    forward_.index.resize(num_values() + 4);
}

// Fills backward_ and source_: a tile has the same values in both orders, by row here and by input there.
void SparsePlan::transpose() {
    backward_ = {.rows = forward_.inputs, .inputs = forward_.rows};
    backward_.counts.resize(std::size_t(backward_.rows) * backward_.num_strips());
    backward_.index.resize(num_values() + 4);
    source_.resize(num_values());
    std::vector<std::uint64_t> next(kStripInputs);
    std::uint64_t filled = 0;
    for (int s = 0; s < backward_.num_strips(); ++s) {
        for (int tile = 0; tile < backward_.num_row_tiles(); ++tile) {
            backward_.tile_begin.push_back(filled);
            const int rows = std::min(kStripInputs, forward_.rows - s * kStripInputs);
            const int columns = std::min(kStripInputs, forward_.inputs - tile * kStripInputs);
            const Strip values = forward_.strip(nullptr, tile, s, rows);
            std::uint8_t* counts =
                &backward_.counts[std::size_t(s) * backward_.rows + std::size_t(tile) * kStripInputs];
            const std::uint64_t first = forward_.begin(tile, s);
            const std::uint64_t count = forward_.begin(tile, s + 1) - first;
            for (std::uint64_t v = 0; v < count; ++v) ++counts[values.index[v]];
            for (int k = 0; k < columns; ++k) {
                next[k] = filled;
                filled += counts[k];
            }
            for (std::uint64_t v = 0, row = 0, left = values.counts[0]; v < count; ++v, --left) {
                while (left == 0) left = values.counts[++row];
                const std::uint64_t at = next[values.index[v]]++;
                backward_.index[at] = std::uint8_t(row);
                source_[at] = std::uint16_t(v);
            }
        }
    }
    backward_.tile_begin.push_back(filled);
}

std::size_t SparsePlan::num_bytes() const {
    const auto bytes = [](const StripOrder& order) {
        return order.tile_begin.size() * 8 + order.counts.size() + order.index.size();
    };
    return bytes(forward_) + bytes(backward_) + source_.size() * 2;
}

void SparsePlan::positions(std::int64_t* out) const {
    const std::uint8_t* index = forward_.index.data();
    const std::uint8_t* count = forward_.counts.data();
    for (int s = 0; s < forward_.num_strips(); ++s) {
        for (std::int64_t n = 0; n < rows(); ++n, ++count) {
            for (int left = *count; left > 0; --left) *out++ = n * columns() + s * kStripInputs + *index++;
        }
    }
}

void SparsePlan::forward(Workspace& work, const TrainingKernels& kernels, const float* values,
                         const float* x_TK, int T, float* y_TN) const {
    multiply(work, kernels, forward_, values, {x_TK, T, columns()}, y_TN);
}

void SparsePlan::backward_input(Workspace& work, const TrainingKernels& kernels, const float* values,
                                const float* dy_TN, int T, float* dx_TK) const {
    work.reserve(0, num_values());
    float* reordered = work.shared();
    work.team.run([&](int thread) {
        const Part strips(backward_.num_strips(), thread, work.team.size());
        for (int s = strips.begin; s < strips.end; ++s) {
            for (int tile = 0; tile < backward_.num_row_tiles(); ++tile) {
                const float* from = values + forward_.begin(tile, s);
                const std::uint64_t end = backward_.begin(s, tile + 1);
                for (std::uint64_t v = backward_.begin(s, tile); v < end; ++v)
                    reordered[v] = from[source_[v]];
            }
        }
    });
    multiply(work, kernels, backward_, reordered, {dy_TN, T, rows()}, dx_TK);
}

// Threads share W out as a grid, so that no sum belongs to two of them.
void SparsePlan::backward_values(Workspace& work, const TrainingKernels& kernels, const float* x_TK,
                                 const float* dy_TN, int T, float* dvalues) const {
    const Tokens x{x_TK, T, columns()}, dy{dy_TN, T, rows()};
    const int row_parts = std::min(work.team.size(), forward_.num_row_tiles());
    const int strip_parts = work.team.size() / row_parts;
    work.reserve(tile_floats(2 + forward_.num_row_tiles() / row_parts));
    work.team.run([&](int thread) {
        if (thread >= row_parts * strip_parts) return;
        const Part tiles(forward_.num_row_tiles(), thread % row_parts, row_parts);
        const Part strips(forward_.num_strips(), thread / row_parts, strip_parts);
        const int row = tiles.begin * kStripInputs, end = std::min(tiles.end * kStripInputs, rows());
        float* inputs = work.owned(thread);
        float* deltas = inputs + tile_floats(1);
        for (int s = strips.begin; s < strips.end; ++s)
            std::fill(dvalues + forward_.begin(s, tiles.begin), dvalues + forward_.begin(s, tiles.end), 0.0f);
        for (int tile = 0; tile < x.num_tiles(); ++tile) {
            dy.pack(tile, row, end, deltas);
            for (int s = strips.begin; s < strips.end; ++s) {
                x.pack(tile, s * kStripInputs, std::min((s + 1) * kStripInputs, columns()), inputs);
                kernels.project(forward_.strip(nullptr, s, tiles.begin, end - row), inputs, deltas,
                                dvalues + forward_.begin(s, tiles.begin));
            }
        }
    });
}

}  // namespace gossamer
