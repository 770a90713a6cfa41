// Products of int8 or int4 weights and int8 activations, dense and sparse: the specification.
//
//   y[t, n] = (sum_k w[n, k] (u[t, k] - 128)) * (x_scale[t] * w_scale[n])      u = q + 128, unsigned
//           = (sum_k w[n, k] u[t, k] - 128 w_sum[n]) * ...
//
// A vector of 64 bytes is 16 rows x 4 inputs. An int4 weight is w = q4 * multiplier, with one multiplier for
// 128 inputs of a row. The sum is an exact int32 (K <= 65536 keeps sums of |w u| below 2^31), so every level
// gives the same bits.

#include <algorithm>
#include <cstring>

#include "kernels/expand.hpp"
#include "kernels/kernels.hpp"

namespace gossamer {
namespace scalar {
namespace {

// Calls sink(panel, token, sums of 16 rows) for each panel and token.
// Vectors that are expanded at a time.
constexpr int run_of(Storage storage) { return storage == Storage::blocks ? kStripVectors : kScaleVectors; }

template <Values kValues, Storage kStorage, class Sink>
void product(const Linear& w, int begin, int end, const Activations& x, Sink sink) {
    for (int panel = begin; panel < end; ++panel) {
        for (int t = 0; t < x.num_tokens; ++t) {
            std::int32_t sums[kPanelRows] = {};
            const std::uint8_t* position = w.panel(panel);
            const std::uint8_t* q = x.q + t * x.stride;
            for (int first = 0; first < w.num_vectors(); first += run_of(kStorage)) {
                const int count = std::min(run_of(kStorage), w.num_vectors() - first);
                std::uint8_t expanded[run_of(kStorage) * kVectorBytes];
                position =
                    expand<kValues, kStorage>(position, w.panel_multipliers(panel, first), count, expanded);
                for (int i = 0; i < count * kVectorBytes; ++i) {
                    const int row = i / 4 % kPanelRows, input = i / kVectorBytes * 4 + i % 4;
                    sums[row] += std::int8_t(expanded[i]) * int(q[4 * first + input]);
                }
            }
            sink(panel, t, sums);
        }
    }
}

template <Values kValues, Storage kStorage>
void matmul(const Linear& w, int begin, int end, const Activations& x, float* y_TN, std::size_t stride) {
    product<kValues, kStorage>(w, begin, end, x, [&](int panel, int token, const std::int32_t* sums) {
        for (int row = 0; row < kPanelRows; ++row) {
            const int n = panel * kPanelRows + row;
            y_TN[token * stride + n] = float(sums[row] - 128 * w.sum[n]) * (x.scale[token] * w.scale[n]);
        }
    });
}

template <Values kValues, Storage kStorage>
void accumulate(const Linear& w, int begin, int end, const Activations& x, std::int32_t* acc_TN,
                std::size_t stride) {
    product<kValues, kStorage>(w, begin, end, x, [&](int panel, int token, const std::int32_t* sums) {
        for (int row = 0; row < kPanelRows; ++row) {
            const int n = panel * kPanelRows + row;
            acc_TN[token * stride + n] = sums[row] - 128 * w.sum[n];
        }
    });
}

}  // namespace

GOSSAMER_MATMUL(i8, dense)
GOSSAMER_MATMUL(i8, sparse)
GOSSAMER_MATMUL(i8, blocks)
GOSSAMER_MATMUL(i4, dense)
GOSSAMER_MATMUL(i4, sparse)
GOSSAMER_ACCUMULATE(i8, dense)
GOSSAMER_ACCUMULATE(i8, sparse)
GOSSAMER_ACCUMULATE(i8, blocks)
GOSSAMER_ACCUMULATE(i4, dense)
GOSSAMER_ACCUMULATE(i4, sparse)

}  // namespace scalar
}  // namespace gossamer
