// What Python says about a model, as the engine takes it.
#pragma once

#include "engine/encoder_weights.hpp"
#include "engine/packed.hpp"
#include "engine/weights.hpp"
#include "python/arrays.hpp"

namespace gossamer {

// The packed model in `buffer`: `tensors` says where each tensor lies, name -> (dtype, shape, byte offset,
// byte length), and `matrices` is the header's table, name -> {"storage", "values", "rows", "columns"}.
Packed read_packed(const Bytes& buffer, nb::dict tensors, nb::handle matrices);

// The table of matrices in the `config` of _native.Model or _native.Encoder.
nb::handle matrix_table(nb::dict config);

// The anatomy of a decoder from the `config` of _native.Model (see _native.pyi). FormatError names what is
// missing or has a wrong type; whether sizes and names fit the file is checked by read_weights.
DecoderConfig read_decoder_config(nb::dict config);

// The same of an encoder, from the `config` of _native.Encoder.
EncoderConfig read_encoder_config(nb::dict config);

}  // namespace gossamer
