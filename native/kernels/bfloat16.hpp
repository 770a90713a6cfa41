// bfloat16: the high half of a float32. Not a number stays none only where its high half says so.
#pragma once

#include <bit>
#include <cstdint>

namespace gossamer::scalar {

// The bits of the nearest bfloat16, halves to even.
inline std::uint16_t nearest_bf16(float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    return std::uint16_t((bits + (bits >> 16 & 1) + 0x7FFF) >> 16);
}

inline float widened(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t(bits) << 16); }

}  // namespace gossamer::scalar
