// Keys and values of one sequence for all layers: chunks of 256 positions, each [layer][G] of the kernels'
// layout (kv_layout.hpp), taken as the sequence grows.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include "kv_layout.hpp"
#include "view.hpp"

namespace gossamer {

class KvCache {
  public:
    KvCache(KvLayout layout, int num_layers, int num_kv_heads, int capacity)
        : layout_(layout),
          num_kv_heads_(num_kv_heads),
          capacity_(capacity),
          chunk_bytes_(layout.chunk_bytes() * std::size_t(num_layers) * std::size_t(num_kv_heads)) {}

    KvCache(KvCache&&) = default;
    KvCache(const KvCache&) = delete;

    int capacity() const { return capacity_; }
    int length() const { return length_; }
    void set_length(int length) { length_ = length; }

    // Takes the memory for positions below `length`; std::bad_alloc changes nothing.
    void reserve(int length) {
        const std::size_t needed = round_up(std::size_t(length), kChunkPositions) / kChunkPositions;
        while (owned_.size() < needed) {
            Memory chunk = allocate(chunk_bytes_, !owned_.empty());
            chunks_.push_back(chunk.get());
            owned_.push_back(std::move(chunk));
        }
    }

    // The chunks, and where a layer's key/value head begins in each.
    const std::uint8_t* const* chunks() const { return chunks_.data(); }
    std::size_t head_begin(int layer, int head) const {
        return (std::size_t(layer) * std::size_t(num_kv_heads_) + std::size_t(head)) * layout_.chunk_bytes();
    }

    // Stores the key and the value of one position; of the newest, also zeros for the values that would
    // follow it in its group. Several threads may store positions of one head.
    void store(int layer, int head, int position, const float* k_E, const float* v_E, bool newest) {
        std::uint8_t* chunk = owned_[position / kChunkPositions].get() + head_begin(layer, head);
        const int p = position % kChunkPositions, inputs = layout_.inputs();
        std::uint8_t* keys = chunk + std::size_t(p / kKeyBlock) * layout_.key_block_bytes();
        std::uint8_t* values =
            chunk + layout_.values_begin() + std::size_t(p / inputs) * layout_.value_step_bytes();
        switch (layout_.values) {
            case Values::f32:
                return put<float>(
                    keys, values, p, newest, [&](int e) { return k_E[e]; }, [&](int e) { return v_E[e]; },
                    0.0f);
            case Values::bf16:
                return put<std::uint16_t>(
                    keys, values, p, newest, [&](int e) { return to_bf16(k_E[e]); },
                    [&](int e) { return to_bf16(v_E[e]); }, 0);
            default: {
                float* scales = reinterpret_cast<float*>(chunk + layout_.scales_begin()) + p;
                const float k_steps = steps(k_E, scales), v_steps = steps(v_E, scales + kChunkPositions);
                put<std::uint8_t>(
                    keys, values, p, newest, [&](int e) { return to_i8(k_E[e] * k_steps); },
                    [&](int e) { return to_i8(v_E[e] * v_steps); }, 128);
            }
        }
    }

  private:
    struct Free {
        void operator()(std::uint8_t* memory) const { std::free(memory); }
    };
    using Memory = std::unique_ptr<std::uint8_t, Free>;

    // Most conversations are short: the first chunk stays on small pages, touched only where it is filled.
    static Memory allocate(std::size_t num_bytes, bool huge_pages) {
        constexpr std::size_t kHugePage = 2 << 20;
        const bool huge = huge_pages && num_bytes >= kHugePage;
        const std::size_t alignment = huge ? kHugePage : kVectorBytes;
        void* memory = std::aligned_alloc(alignment, round_up(num_bytes, alignment));
        if (memory == nullptr) throw std::bad_alloc();
        if (huge) madvise(memory, round_up(num_bytes, alignment), MADV_HUGEPAGE);
        return Memory(static_cast<std::uint8_t*>(memory));
    }

    static std::uint16_t to_bf16(float x) {
        const auto bits = std::bit_cast<std::uint32_t>(x);
        if (x != x) return std::uint16_t(bits >> 16 | 0x40);
        return std::uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
    }

    static std::uint8_t to_i8(float steps) {
        return std::uint8_t(std::clamp(int(std::lrintf(steps)), -127, 127) + 128);
    }

    // The scale max|x| / 127, and the factor to its steps.
    float steps(const float* x_E, float* scale) const {
        float largest = 0;
        for (int e = 0; e < layout_.head_dim; ++e) largest = std::max(largest, std::abs(x_E[e]));
        *scale = largest / 127.0f;
        return largest > 0 ? 127.0f / largest : 0.0f;
    }

    template <class T, class Key, class Value>
    void put(std::uint8_t* keys, std::uint8_t* values, int p, bool newest, Key key_at, Value value_at,
             T zero) {
        constexpr int kInputs = 4 / sizeof(T);
        T* key = reinterpret_cast<T*>(keys) + p % kKeyBlock * kInputs;
        T* value = reinterpret_cast<T*>(values) + p % kInputs;
        for (int e = 0; e < layout_.head_dim; ++e) {
            key[e / kInputs * (kKeyBlock * kInputs) + e % kInputs] = key_at(e);
            value[e * kInputs] = value_at(e);
        }
        for (int later = 1; newest && later < kInputs - p % kInputs; ++later) {
            for (int e = 0; e < layout_.head_dim; ++e) value[e * kInputs + later] = zero;
        }
    }

    KvLayout layout_;
    int num_kv_heads_, capacity_, length_ = 0;
    std::size_t chunk_bytes_;
    std::vector<Memory> owned_;
    std::vector<const std::uint8_t*> chunks_;
};

}  // namespace gossamer
