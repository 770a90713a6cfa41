// Keys and values of one sequence, float32, for all layers.
//
// Keys lie as [layer][G][position / 16][E][16] and values as [layer][G][position][E padded to 16]: what the
// attention kernel reads for one key/value head is contiguous. Memory is touched only as positions fill.
#pragma once

#include <cstdlib>
#include <memory>
#include <new>

#include "view.hpp"

namespace gossamer {

class KvCache {
  public:
    KvCache(int num_layers, int num_kv_heads, int head_dim, int capacity)
        : num_kv_heads_(num_kv_heads),
          head_dim_(head_dim),
          capacity_(capacity),
          padded_capacity_(round_up(std::size_t(capacity), 16)),
          padded_head_dim_(round_up(std::size_t(head_dim), 16)) {
        const std::size_t heads = std::size_t(num_layers) * std::size_t(num_kv_heads) * padded_capacity_;
        keys_.reset(static_cast<float*>(std::calloc(heads * std::size_t(head_dim), sizeof(float))));
        values_.reset(static_cast<float*>(std::calloc(heads * padded_head_dim_, sizeof(float))));
        if (!keys_ || !values_) throw std::bad_alloc();
    }

    int capacity() const { return capacity_; }
    int length() const { return length_; }
    void set_length(int length) { length_ = length; }

    float* keys(int layer, int head) {
        return keys_.get() + head_begin(layer, head) * std::size_t(head_dim_);
    }
    float* values(int layer, int head) { return values_.get() + head_begin(layer, head) * padded_head_dim_; }

    // Stores the key and the value of one position.
    void store(int layer, int head, int position, const float* k_E, const float* v_E) {
        float* block =
            keys(layer, head) + std::size_t(position / 16) * std::size_t(head_dim_) * 16 + position % 16;
        float* value = values(layer, head) + std::size_t(position) * padded_head_dim_;
        for (int e = 0; e < head_dim_; ++e) block[e * 16] = k_E[e];
        for (int e = 0; e < head_dim_; ++e) value[e] = v_E[e];
    }

  private:
    struct Free {
        void operator()(float* memory) const { std::free(memory); }
    };

    std::size_t head_begin(int layer, int head) const {
        return (std::size_t(layer) * std::size_t(num_kv_heads_) + std::size_t(head)) * padded_capacity_;
    }

    int num_kv_heads_, head_dim_, capacity_, length_ = 0;
    std::size_t padded_capacity_, padded_head_dim_;
    std::unique_ptr<float, Free> keys_, values_;
};

}  // namespace gossamer
