#include "engine/linears.hpp"

namespace gossamer {
namespace {

// Adds the bias of rows [begin, end) to those of each token.
void add_bias(const float* bias, int begin, int end, int num_tokens, float* y_TN, std::size_t stride) {
    for (int t = 0; t < num_tokens; ++t) {
        float* y = y_TN + std::size_t(t) * stride;
        for (int n = begin; n < end; ++n) y[n] += bias[n];
    }
}

}  // namespace

Group::Group(std::vector<Affine> group, bool paired_rows, int num_threads, bool fine_inputs)
    : matrices(std::move(group)),
      shares(std::size_t(num_threads)),
      paired(paired_rows),
      fine(fine_inputs && is_integer(matrices[0].w.values)) {
    const std::size_t split = paired ? 1 : matrices.size();  // matrices whose panels are dealt out
    std::size_t total = 0, before = 0;
    for (const auto& [w, bias] : matrices) {
        kernels.push_back(&find_matmul(w.storage, w.values, isa()));
        (is_integer(w.values) ? needs_i8 : needs_f32) = true;
        const Isa by = kernels.back()->isa;
        needs_split = needs_split || (w.values == Values::bf16 && (by == Isa::avx512_bf16 || by == Isa::amx));
        total += w.panel_bytes(0, w.num_panels());
    }
    for (std::size_t i = 0; i < split; ++i) {
        for (int panel = 0; panel < matrices[i].w.num_panels(); ++panel) {
            std::size_t cost = matrices[i].w.panel_bytes(panel, panel + 1);
            for (std::size_t j = split; j < matrices.size(); ++j)
                cost += matrices[j].w.panel_bytes(panel, panel + 1);
            const std::size_t middle =
                (before + cost / 2) * std::size_t(num_threads) / std::max<std::size_t>(total, 1);
            auto& mine = shares[std::min(middle, std::size_t(num_threads) - 1)];
            if (mine.empty() || mine.back().matrix != int(i)) mine.push_back({int(i), panel, panel});
            mine.back().end = panel + 1;
            before += cost;
        }
    }
}

std::size_t Group::bytes() const {
    std::size_t total = 0;
    for (const auto& [w, bias] : matrices) {
        total += w.bytes();
        if (bias != nullptr) total += std::size_t(w.padded_rows()) * sizeof(float);
    }
    return total;
}

Linears::Linears(int max_columns, ThreadPool& pool)
    : pool_(pool),
      kernels_(find_vector(isa())),
      stride_(Activations::padded(int(round_up(std::size_t(max_columns), 16)))),
      num_rows_(std::size_t(std::max(kMaxTokens, 2 * pool.size()))),
      x_(num_rows_ * stride_ * sizeof(float)),
      x_i8_(num_rows_ * stride_),
      x_block_(std::size_t(std::max(Activations::kBlockTokens, 2 * pool.size())) * stride_),
      x_high_(kMaxTokens * stride_ * sizeof(std::uint16_t)),
      x_low_(kMaxTokens * stride_ * sizeof(std::uint16_t)),
      scales_(num_rows_ * sizeof(float)),
      largest_(std::size_t(pool.size()) * kMaxTokens * sizeof(float)),
      rest_(std::size_t(pool.size()) * stride_ * sizeof(float)),
      fine_(std::size_t(pool.size()) * kMaxTokens * kFinePanels * kPanelRows * sizeof(float)) {}

void Linears::prepare(const Group& group, const float* x_K, float largest, int token, int num_tokens,
                      int thread) {
    const int columns = group.columns();
    if (group.needs_i8) {
        const int each = group.rows_per_token(), rows = each * num_tokens, first = each * token;
        const std::size_t mine = first_row(group, num_tokens, thread);
        for (int row = first; row < first + each; ++row) {
            const std::size_t index = mine + std::size_t(row);
            std::uint8_t* q = x_i8_.bytes() + index * stride_;
            const float scale = scales_.floats()[index] = kernels_.quantize(x_K, columns, largest, q);
            if (rows > 1 && rows <= Activations::kBlockTokens)
                Activations::interleave(q, columns, row, rows, x_block_.bytes() + mine * stride_);
            if (row + 1 == first + each) break;
            float* rest = rest_.floats() + std::size_t(thread) * stride_;
            for (int k = 0; k < columns; ++k) rest[k] = x_K[k] - scale * float(int(q[k]) - 128);
            x_K = rest;
            largest = kernels_.largest(rest, columns);
        }
    }
    if (!group.needs_f32) return;
    const std::size_t begin = std::size_t(num_tokens == 1 ? thread : token) * stride_;
    const std::size_t pad = Activations::padded(columns) - std::size_t(columns);
    float* x = x_.floats() + begin;
    std::copy(x_K, x_K + columns, x);
    std::fill_n(x + columns, pad, 0.0f);
    if (!group.needs_split || num_tokens == 1) return;
    kernels_.split(x, columns + int(pad), x_high_.halves() + begin, x_low_.halves() + begin);
}

void Linears::multiply(const Group& group, int num_tokens, std::initializer_list<float*> outputs,
                       int thread) const {
    const Activations x = inputs(group, num_tokens, thread);
    for (const Share& share : group.shares[thread]) {
        if (group.fine) {
            multiply_fine(group, share, x, *outputs.begin(), thread);
            continue;
        }
        const int end = group.paired ? int(group.matrices.size()) : share.matrix + 1;
        for (int i = share.matrix; i < end; ++i) {
            const auto& [w, bias] = group.matrices[i];
            float* y = outputs.begin()[i];
            const std::size_t stride = std::size_t(w.padded_rows());
            group.kernels[i]->matmul(w, share.begin, share.end, x, y, stride);
            if (bias == nullptr) continue;
            add_bias(bias, share.begin * kPanelRows, share.end * kPanelRows, num_tokens, y, stride);
        }
    }
}

// The same with fine inputs: a token's output is the sum of those of its two rows.
void Linears::multiply_fine(const Group& group, const Share& share, const Activations& x, float* y_TN,
                            int thread) const {
    const auto& [w, bias] = group.matrices[0];
    constexpr std::size_t kWidth = kFinePanels * kPanelRows;
    float* both = fine_.floats() + std::size_t(thread) * kMaxTokens * kWidth;
    for (int panel = share.begin; panel < share.end; panel += kFinePanels) {
        const int count = std::min(kFinePanels, share.end - panel);
        group.kernels[0]->matmul(w.from(panel), 0, count, x, both, kWidth);
        for (int t = 0; t < x.num_tokens / 2; ++t) {
            const float *own = both + std::size_t(2 * t) * kWidth, *rest = own + kWidth;
            float* y = y_TN + std::size_t(t) * std::size_t(w.padded_rows()) + panel * kPanelRows;
            for (int n = 0; n < count * kPanelRows; ++n) y[n] = own[n] + rest[n];
        }
    }
    if (bias == nullptr) return;
    add_bias(bias, share.begin * kPanelRows, share.end * kPanelRows, x.num_tokens / 2, y_TN,
             std::size_t(w.padded_rows()));
}

// Where a thread finds the inputs of a group: its own copy of a single token's rows, else the shared rows.
Activations Linears::inputs(const Group& group, int num_tokens, int thread) const {
    const int rows = group.rows_per_token() * num_tokens;
    const std::size_t mine = first_row(group, num_tokens, thread), first = mine * stride_;
    return {.num_tokens = rows,
            .stride = stride_,
            .x = x_.floats() + first,
            .q = x_i8_.bytes() + first,
            .q_block = (rows == 1 ? x_i8_ : x_block_).bytes() + first,
            .scale = scales_.floats() + mine,
            .high = x_high_.halves(),
            .low = x_low_.halves()};
}

void Linears::make_up_inputs() {
    std::fill_n(x_.floats(), num_rows_ * stride_, 0.5f);
    for (std::size_t row = 0; row < num_rows_; ++row) {
        for (std::size_t i = 0; i < stride_; ++i) x_i8_.bytes()[row * stride_ + i] = std::uint8_t(i * 37);
    }
    std::fill_n(scales_.floats(), num_rows_, 0.01f);
    std::fill_n(x_high_.bytes(), kMaxTokens * stride_ * 2, std::uint8_t(0x3F));
    std::fill_n(x_low_.bytes(), kMaxTokens * stride_ * 2, std::uint8_t(0x3B));
}

}  // namespace gossamer
