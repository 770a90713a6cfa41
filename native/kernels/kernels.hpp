// Declarations of the functions in list.hpp, level::name, with the types that table.hpp gives them.
#pragma once

#include <type_traits>

#include "kernels/table.hpp"

namespace gossamer {

#define KERNEL(level, kernels, family, values, storage, name) \
    namespace level {                                         \
    std::remove_pointer_t<decltype(kernels::family)> name;    \
    }
#include "kernels/list.hpp"
#undef KERNEL

// Define matmul_<values>_<storage> and accumulate_<values>_<storage> of the list by the templates matmul and
// accumulate of the file that uses this. What follows the storage are further arguments of the template.
#define GOSSAMER_MATMUL(values, storage, ...)                                                                \
    void matmul_##values##_##storage(const Linear& w, int begin, int end, const Activations& x, float* y_TN, \
                                     std::size_t stride) {                                                   \
        matmul<Values::values, Storage::storage __VA_OPT__(, ) __VA_ARGS__>(w, begin, end, x, y_TN, stride); \
    }
#define GOSSAMER_ACCUMULATE(values, storage, ...)                                                         \
    void accumulate_##values##_##storage(const Linear& w, int begin, int end, const Activations& x,       \
                                         std::int32_t* acc_TN, std::size_t stride) {                      \
        accumulate<Values::values, Storage::storage __VA_OPT__(, ) __VA_ARGS__>(w, begin, end, x, acc_TN, \
                                                                                stride);                  \
    }

}  // namespace gossamer
