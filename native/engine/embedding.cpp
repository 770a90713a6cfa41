#include "engine/embedding.hpp"

#include <bit>
#include <cstdint>
#include <cstring>

namespace gossamer {
namespace {

float widened(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t(bits) << 16); }

// The int4 number, -8 to 7, that a nibble is in two's complement.
int signed_nibble(int nibble) { return (nibble ^ 8) - 8; }

}  // namespace

void look_up(const Linear& table, int row, float* x_D) {
    const int inputs = inputs_per_vector(table.values), panel = row / kPanelRows, place = row % kPanelRows;
    const std::uint8_t* weights = table.panel(panel) + place * 4;  // a row has 4 bytes of each 64
    for (int d = 0; d < table.columns; ++d) {
        const int vector = d / inputs, input = d % inputs;
        const std::uint8_t* bytes = weights + std::size_t(vector) * kVectorBytes;
        switch (table.values) {
            case Values::f32:
                std::memcpy(&x_D[d], bytes, sizeof(float));
                break;
            case Values::bf16: {
                std::uint16_t bits;
                std::memcpy(&bits, bytes + 2 * input, sizeof bits);
                x_D[d] = widened(bits);
                break;
            }
            case Values::i8:
                x_D[d] = float(std::int8_t(bytes[input])) * table.scale[row];
                break;
            case Values::i4: {
                const int pair = weights[std::size_t(vector / 2) * kVectorBytes + input];
                const int weight = signed_nibble(vector % 2 ? pair / 16 : pair % 16);
                const int multiplier = table.panel_multipliers(panel, vector)[place];
                x_D[d] = float(weight * multiplier) * table.scale[row];
                break;
            }
        }
    }
}

std::size_t row_bytes(const Linear& table) {
    const std::size_t columns = std::size_t(table.columns);
    std::size_t total = (columns * std::size_t(type_of(table.values).bits) + 7) / 8;
    if (is_integer(table.values)) total += sizeof(float);
    if (table.values == Values::i4) total += std::size_t(table.num_scale_groups());
    return total;
}

}  // namespace gossamer
