// Python's arrays, as the engine reads and returns them, and what the files of bindings share.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/isa.hpp"
#include "base/view.hpp"

namespace gossamer {

namespace nb = nanobind;

using Bytes = nb::ndarray<const std::uint8_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Ids = nb::ndarray<const std::int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Floats = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using FloatMatrix = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using FloatCube = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

// A NumPy array [rows, columns] over owned memory with rows `stride` apart.
template <class T>
nb::ndarray<nb::numpy, T, nb::ndim<2>> to_numpy(std::unique_ptr<T[]> data, std::size_t rows,
                                                std::size_t columns, std::size_t stride) {
    T* pointer = data.release();
    nb::capsule owner(pointer, [](void* memory) noexcept { delete[] static_cast<T*>(memory); });
    const std::size_t shape[] = {rows, columns};
    const std::int64_t strides[] = {std::int64_t(stride), 1};
    return nb::ndarray<nb::numpy, T, nb::ndim<2>>(pointer, 2, shape, owner, strides);
}

inline Values parse_kv(const std::string& name) {
    if (name == "f32") return Values::f32;
    if (name == "bf16") return Values::bf16;
    if (name == "i8") return Values::i8;
    throw ConfigError("found the type '" + name + "' of cached keys and values; expected f32, bf16 or i8");
}

// The level of that name; UnsupportedError when the machine, capped by GOSSAMER_ISA, lacks it.
Isa runnable(const std::string& level);

// Adds the table of kernels, and an entry that runs each of its rows, to the module.
void bind_kernels(nb::module_& m);

// Adds the engine of encoders.
void bind_encoder(nb::module_& m);

// Adds what training calls.
void bind_training(nb::module_& m);

}  // namespace gossamer
