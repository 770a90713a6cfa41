// A kind of processor that has no kernels of its own yet: all of scalar/list.hpp run.
