// The table of kernels, a line for each function:
//
//   KERNEL(level, kernels, family, values, storage, name)
//
// says that level::name is what `kernels::family` points to, a member of one of the structs of table.hpp, for
// these values and this storage. Who includes this file defines KERNEL first: kernels.hpp declares the
// functions by it, table.cpp finds them and lists them for Python, whose tests and benchmarks go through that
// list. To add a kernel, write the function, and its line in the list of its level.
#include "kernels/scalar/list.hpp"
// Of the kind of processor that the build is for: CMake chooses the folder.
#include "processor_list.hpp"
