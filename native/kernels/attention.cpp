// Attention of one new token, for the query heads that share a key/value head, over the positions in the
// cache.
//
//   s[p] = scale * sum_e q[e] k[p, e];   w[p] = exp(s[p] - max s);   out[e] = sum_p w[p] v[p, e] / sum_p w[p]
//
// Keys lie in blocks of 16 positions, [E][16], so that scores need no horizontal sums; values as
// [position][E]. Sums over e and p run in order, the sum of weights in 16 lanes and then lane after lane:
// every level gives the same bits. Bound by memory: a key/value head is read once for all its query heads.

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "kernels/exponential.hpp"
#include "kernels/kernels.hpp"
#include "kernels/target.hpp"

namespace gossamer {
namespace {

constexpr int kBlock = 16;  // positions

}  // namespace

namespace scalar {
namespace {

// Scores of one head -> weights, in place; returns their sum.
float softmax(float* scores, int count) {
    const float largest = *std::max_element(scores, scores + count);
    float lanes[kBlock] = {};
    for (int p = 0; p < count; ++p) {
        scores[p] = exponential_of(scores[p] - largest);
        lanes[p % kBlock] += scores[p];
    }
    float sum = 0;
    for (float lane : lanes) sum += lane;
    return sum;
}

}  // namespace

void attention(const AttentionTask& task) {
    const int E = task.head_dim, count = task.num_positions;
    const int padded = int(round_up(count, kBlock)), width = int(round_up(E, 16));
    for (int head = 0; head < task.num_heads; ++head) {
        const float* q = task.q_AE + head * E;
        float* scores = task.scores + std::size_t(head) * padded;
        for (int p = 0; p < count; ++p) {
            const float* k = task.k_blocks + std::size_t(p / kBlock) * E * kBlock + p % kBlock;
            float sum = 0;
            for (int e = 0; e < E; ++e) sum += q[e] * k[e * kBlock];
            scores[p] = sum * task.scale;
        }
        const float sum = softmax(scores, count);
        float* out = task.out_AE + head * E;
        for (int e = 0; e < E; ++e) {
            float total = 0;
            for (int p = 0; p < count; ++p) total += scores[p] * task.v_SE[std::size_t(p) * width + e];
            out[e] = total / sum;
        }
    }
}

}  // namespace scalar

GOSSAMER_BEGIN_AVX512
namespace avx512 {
namespace {

inline __mmask16 first_lanes(int count) {
    return count >= kBlock ? __mmask16(0xFFFF) : __mmask16((1u << count) - 1);
}

// Scores of up to 4 heads against one block of keys after the other.
template <int H>
void score(const AttentionTask& task, int head, std::size_t padded) {
    const float* q = task.q_AE + head * task.head_dim;
    const float* k = task.k_blocks;
    const __m512 scale = _mm512_set1_ps(task.scale);
    for (int p = 0; p < task.num_positions; p += kBlock) {
        __m512 sums[H];
        for (__m512& sum : sums) sum = _mm512_setzero_ps();
        for (int e = 0; e < task.head_dim; ++e, k += kBlock) {
            const __m512 keys = _mm512_loadu_ps(k);
            for (int h = 0; h < H; ++h) {
                sums[h] =
                    _mm512_add_ps(sums[h], _mm512_mul_ps(_mm512_set1_ps(q[h * task.head_dim + e]), keys));
            }
        }
        for (int h = 0; h < H; ++h)
            _mm512_storeu_ps(task.scores + (head + h) * padded + p, _mm512_mul_ps(sums[h], scale));
    }
}

float softmax(float* scores, int count) {
    const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    __m512 largest = lowest;
    for (int p = 0; p < count; p += kBlock) {
        largest = _mm512_max_ps(largest, _mm512_mask_loadu_ps(lowest, first_lanes(count - p), scores + p));
    }
    largest = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    __m512 sums = _mm512_setzero_ps();
    for (int p = 0; p < count; p += kBlock) {
        const __mmask16 mask = first_lanes(count - p);
        const __m512 distance = _mm512_sub_ps(_mm512_maskz_loadu_ps(mask, scores + p), largest);
        const __m512 weights = _mm512_maskz_mov_ps(mask, exponential_of(distance));
        _mm512_storeu_ps(scores + p, weights);
        sums = _mm512_add_ps(sums, weights);
    }
    float lanes[kBlock], sum = 0;
    _mm512_storeu_ps(lanes, sums);
    for (float lane : lanes) sum += lane;
    return sum;
}

// out = sum_p w[p] v[p] / sum for H heads and 16 of the E outputs.
template <int H>
void weigh(const AttentionTask& task, int head, std::size_t padded, int first, const float* sums) {
    const std::size_t width = round_up(task.head_dim, 16);
    const float* weights = task.scores + head * padded;
    const float* v = task.v_SE + first;
    __m512 totals[H];
    for (__m512& total : totals) total = _mm512_setzero_ps();
    for (int p = 0; p < task.num_positions; ++p, v += width) {
        const __m512 values = _mm512_loadu_ps(v);
        for (int h = 0; h < H; ++h) {
            totals[h] =
                _mm512_add_ps(totals[h], _mm512_mul_ps(_mm512_set1_ps(weights[h * padded + p]), values));
        }
    }
    for (int h = 0; h < H; ++h) {
        const __m512 out = _mm512_div_ps(totals[h], _mm512_set1_ps(sums[h]));
        _mm512_mask_storeu_ps(task.out_AE + (head + h) * task.head_dim + first,
                              first_lanes(task.head_dim - first), out);
    }
}

template <int H>
void attend(const AttentionTask& task, int head) {
    const std::size_t padded = round_up(task.num_positions, kBlock);
    score<H>(task, head, padded);
    float sums[H];
    for (int h = 0; h < H; ++h) sums[h] = softmax(task.scores + (head + h) * padded, task.num_positions);
    for (int first = 0; first < task.head_dim; first += 16) weigh<H>(task, head, padded, first, sums);
}

}  // namespace

void attention(const AttentionTask& task) {
    int head = 0;
    for (; head + 4 <= task.num_heads; head += 4) attend<4>(task, head);
    for (; head < task.num_heads; ++head) attend<1>(task, head);
}

}  // namespace avx512
GOSSAMER_END

}  // namespace gossamer
