// Inputs in the order of layout.py's `fragments` or row by row, and sums to outputs: as docs/format.md has
// them, to the bit.
#pragma once
#include "warp.cuh"

constexpr int kTokenWarps = 4;  // of a block, which has a token
constexpr int kTokenThreads = kTokenWarps * kLanes;
constexpr int kOutputThreads = 256;  // of a block, each with an output
constexpr float kScaleOfZeros = 1.0f / (1 << 23);

struct RoundInputs {
    const void* x;      // [tokens][inputs], bfloat16 or float32
    uint32_t* rounded;  // [steps][tiles][4][32][2]; with no tiles int8 [blocks][steps * 128]
    float* scales;      // [tokens]
    int32_t tokens, inputs, steps, tiles;
    int32_t bfloat16;
};

struct OrderInputs {
    const uint16_t* x;  // bfloat16 [tokens][inputs]
    uint32_t* ordered;  // [steps][tiles][8][32][2]
    int32_t tokens, inputs, steps, tiles;
};

struct ScaleSums {
    const void* sums;           // [shares][sum_tokens][panels * 16], int32; float if there are no scales
    const float* input_scales;  // [tokens]
    const float* scales;        // [outputs]
    void* y;                    // [tokens][outputs], bfloat16 or float32
    int32_t tokens, sum_tokens, outputs, panels, shares;
    int32_t bfloat16;
};

GOSSAMER_DEVICE uint16_t bfloat16_of(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u)
        return static_cast<uint16_t>((bits >> 16) | 0x40);  // stays no number
    return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Tokens that fill the last tile, or the last rows of a dense product, are zeros.
GOSSAMER_KERNEL(kTokenThreads) round_inputs(RoundInputs job) {
    const int token = block_index();
    const int64_t row = static_cast<int64_t>(token) * job.inputs;
    const auto input = [&](int k) {
        if (token >= job.tokens || k >= job.inputs) return 0.0f;
        if (job.bfloat16)
            return float_of(static_cast<uint32_t>(static_cast<const uint16_t*>(job.x)[row + k]) << 16);
        return static_cast<const float*>(job.x)[row + k];
    };
    uint32_t largest = 0;  // bits of a magnitude, which are ordered as the magnitudes are
    for (int k = thread_index(); k < job.inputs; k += kTokenThreads) {
        const uint32_t magnitude = bits_of(input(k)) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
    }
    GOSSAMER_UNROLL
    for (int by = 1; by < kLanes; by *= 2) {
        const uint32_t other = shuffle_xor(largest, by);
        largest = other > largest ? other : largest;
    }
    const uint32_t of_warps = shared_memory();
    if (thread_index() % kLanes == 0) store_shared(of_warps + 4 * (thread_index() / kLanes), largest);
    sync_block();
    for (int warp = 0; warp < kTokenWarps; ++warp) {
        const uint32_t other = load_shared(of_warps + 4 * warp);
        largest = other > largest ? other : largest;
    }
    const float quotient = divide(float_of(largest), 127.5f);  // 0 of the smallest numbers, too
    const float scale = quotient == 0.0f ? kScaleOfZeros : quotient;
    if (thread_index() == 0 && token < job.tokens) job.scales[token] = scale;
    for (int word = thread_index(); word < job.steps * 32; word += kTokenThreads) {
        uint32_t four = 0;
        for (int place = 0; place < 4; ++place) {
            int32_t rounded = round_to_even(divide(input(4 * word + place), scale));
            rounded = rounded < -128 ? -128 : rounded > 127 ? 127 : rounded;
            four |= (static_cast<uint32_t>(rounded) & 255) << (8 * place);
        }
        if (job.tiles == 0) {
            job.rounded[static_cast<int64_t>(token) * job.steps * 32 + word] = four;
            continue;
        }
        const int step = word / 32, product = word % 32 / 8, half = word % 8 / 4, t = word % 4;
        const int64_t tile = static_cast<int64_t>(step) * job.tiles + token / 8;
        job.rounded[((tile * 4 + product) * kLanes + 4 * (token % 8) + t) * 2 + half] = four;
    }
}

// A block has a token, zeros where there is none. A lane's two words are four inputs that follow one another.
GOSSAMER_KERNEL(kTokenThreads) order_inputs(OrderInputs job) {
    const int token = block_index();
    const uint16_t* x = job.x + static_cast<int64_t>(token) * job.inputs;
    for (int word = thread_index(); word < job.steps * 64; word += kTokenThreads) {
        uint32_t two = 0;
        for (int place = 0; place < 2; ++place) {
            const int k = 2 * word + place;
            if (token < job.tokens && k < job.inputs) two |= static_cast<uint32_t>(x[k]) << (16 * place);
        }
        const int step = word / 64, product = word % 64 / 8, t = word % 8 / 2;
        const int64_t tile = static_cast<int64_t>(step) * job.tiles + token / 8;
        job.ordered[((tile * 8 + product) * kLanes + 4 * (token % 8) + t) * 2 + word % 2] = two;
    }
}

GOSSAMER_KERNEL(kOutputThreads) scale_sums(ScaleSums job) {
    const int64_t index = static_cast<int64_t>(block_index()) * kOutputThreads + thread_index();
    if (index >= static_cast<int64_t>(job.tokens) * job.outputs) return;
    const int token = static_cast<int>(index / job.outputs);
    const int output = static_cast<int>(index % job.outputs);
    const int64_t rows = static_cast<int64_t>(job.panels) * 16;
    const int64_t of_share = job.sum_tokens * rows;
    const int64_t from = token * rows + output;
    float y = 0.0f;
    if (job.scales) {
        int32_t sum = 0;
        for (int share = 0; share < job.shares; ++share)
            sum += static_cast<const int32_t*>(job.sums)[from + share * of_share];
        y = multiply(to_float(sum), multiply(job.input_scales[token], job.scales[output]));
    } else {
        for (int share = 0; share < job.shares; ++share)
            y += static_cast<const float*>(job.sums)[from + share * of_share];
    }
    if (job.bfloat16) {
        static_cast<uint16_t*>(job.y)[index] = bfloat16_of(y);
    } else {
        static_cast<float*>(job.y)[index] = y;
    }
}
