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

#include "base/view.hpp"
#include "kernels/kv_layout.hpp"

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

    // Stores the key and the value of one position; of the newest, also zeros for what would follow it in its
    // group. Several threads may store positions of one head.
    void store(int layer, int head, int position, const float* k_E, const float* v_E, bool newest) {
        std::uint8_t* chunk = owned_[position / kChunkPositions].get() + head_begin(layer, head);
        const int p = position % kChunkPositions;
        switch (layout_.values) {
            case Values::f32:
                put<float>(chunk, p, [&](int e) { return k_E[e]; }, [&](int e) { return v_E[e]; });
                break;
            case Values::bf16:
                put<std::uint16_t>(
                    chunk, p, [&](int e) { return to_bf16(k_E[e]); }, [&](int e) { return to_bf16(v_E[e]); });
                break;
            default:
                float* scales = reinterpret_cast<float*>(chunk) + p;
                const float k_steps = steps(k_E, scales), v_steps = steps(v_E, scales + kChunkPositions);
                put<std::uint8_t>(
                    chunk, p, [&](int e) { return to_i8(k_E[e] * k_steps); },
                    [&](int e) { return to_i8(v_E[e] * v_steps); });
        }
        if (newest) clear_after(chunk, p);
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
    void put(std::uint8_t* chunk, int p, Key key_at, Value value_at) {
        constexpr int kInputs = 4 / sizeof(T);
        const int E = layout_.head_dim;
        T* key = reinterpret_cast<T*>(chunk + layout_.key_block(p / kKvBlock)) + p % kKvBlock * kInputs;
        for (int e = 0; e < E; ++e) key[e / kInputs * (kKvBlock * kInputs) + e % kInputs] = key_at(e);
        for (int first = 0, block = 0; first < E; first += kKvBlock, ++block) {
            T* value = reinterpret_cast<T*>(value_group(chunk, block, p)) + p % kInputs;
            for (int e = first; e < std::min(E, first + kKvBlock); ++e)
                value[(e - first) * kInputs] = value_at(e);
        }
    }

    // The I positions that a value of position p lies with, in one block.
    std::uint8_t* value_group(std::uint8_t* chunk, int block, int p) const {
        return chunk + layout_.value_block(block) +
               std::size_t(p / layout_.inputs()) * layout_.value_step_bytes(block);
    }

    // Makes the values that follow position p in its group finite, and zeroes the keys that follow it in its
    // vectors: kernels multiply these before they leave them out, and left-over bytes may be subnormal
    // numbers, of which a product takes a hundred times as long.
    void clear_after(std::uint8_t* chunk, int p) const {
        std::uint8_t* key = chunk + layout_.key_block(p / kKvBlock) + std::size_t(p % kKvBlock + 1) * 4;
        for (int step = 0; step < layout_.key_steps(); ++step)
            std::memset(key + std::size_t(step) * KvLayout::key_step_bytes(), 0,
                        std::size_t(kKvLanes - 1 - p % kKvLanes) * 4);
        const std::size_t bytes = 4 / std::size_t(layout_.inputs());
        for (int block = 0; block < layout_.num_value_blocks(); ++block) {
            std::uint8_t* group = value_group(chunk, block, p);
            for (std::size_t i = 0; i < layout_.value_step_bytes(block); i += 4) {
                for (int later = p % layout_.inputs() + 1; later < layout_.inputs(); ++later)
                    std::memset(group + i + later * bytes, 0, bytes);
            }
        }
    }

    KvLayout layout_;
    int num_kv_heads_, capacity_, length_ = 0;
    std::size_t chunk_bytes_;
    std::vector<Memory> owned_;
    std::vector<const std::uint8_t*> chunks_;
};

}  // namespace gossamer
