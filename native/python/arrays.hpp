// How Python's arrays and dictionaries become what the engine reads.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "engine/packed.hpp"

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

inline MatrixEntry matrix_entry(nb::handle entry) {
    return {.storage = parse_storage(nb::cast<std::string>(entry["storage"])),
            .values = parse_values(nb::cast<std::string>(entry["values"])),
            .rows = nb::cast<int>(entry["rows"]),
            .columns = nb::cast<int>(entry["columns"])};
}

inline Packed read_packed(const Bytes& buffer, nb::dict tensors, nb::dict matrices) {
    if (buffer.size() == 0) throw FormatError("found an empty buffer; expected a whole packed model");
    if (reinterpret_cast<std::uintptr_t>(buffer.data()) % 64 != 0) {
        throw EngineError(
            "the packed model's buffer must begin at a multiple of 64 bytes, as a memory map does");
    }
    Packed packed{.data = buffer.data(), .num_bytes = buffer.size()};
    for (auto [name, entry] : tensors) {
        packed.tensors[nb::cast<std::string>(name)] = {
            .dtype = nb::cast<std::string>(entry[0]),
            .shape = nb::cast<std::vector<std::size_t>>(nb::list(entry[1])),
            .offset = nb::cast<std::size_t>(entry[2]),
            .num_bytes = nb::cast<std::size_t>(entry[3])};
    }
    for (auto [name, entry] : matrices) packed.matrices[nb::cast<std::string>(name)] = matrix_entry(entry);
    return packed;
}

// The level of that name; UnsupportedError when the machine, capped by GOSSAMER_ISA, lacks it.
Isa runnable(const std::string& level);

// Adds the table of kernels, and an entry that runs each of its rows, to the module.
void bind_kernels(nb::module_& m);

// Adds what training calls.
void bind_training(nb::module_& m);

}  // namespace gossamer
