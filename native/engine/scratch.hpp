// Memory for intermediate results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>

#include "base/view.hpp"

namespace gossamer {

// Memory that begins at a multiple of 64 bytes and has 64 readable bytes after its last. It is not
// initialized: the system provides only the pages that are written.
class Scratch {
  public:
    explicit Scratch(std::size_t num_bytes) : memory_(std::aligned_alloc(64, round_up(num_bytes + 64, 64))) {
        if (memory_ == nullptr) throw std::bad_alloc();
    }
    ~Scratch() { std::free(memory_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    float* floats() const { return static_cast<float*>(memory_); }
    std::uint8_t* bytes() const { return static_cast<std::uint8_t*>(memory_); }
    std::uint16_t* halves() const { return static_cast<std::uint16_t*>(memory_); }

  private:
    void* memory_;
};

}  // namespace gossamer
