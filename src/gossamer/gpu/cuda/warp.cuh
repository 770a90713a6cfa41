// What the kernels ask of a warp, as instructions. Where CUDA does not compile them, native/gpu/warp.hpp has
// the same functions for lanes that take turns on a CPU: the kernels' text is one.
#pragma once

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <cstdint>
#endif

constexpr int kLanes = 32;

struct Word4 {
    uint32_t x, y, z, w;
};

#ifndef __CUDACC__
#include "warp.hpp"
#else

#define GOSSAMER_KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define GOSSAMER_DEVICE __device__ __forceinline__
#define GOSSAMER_UNROLL _Pragma("unroll")
#define GOSSAMER_ROLLED _Pragma("unroll 1")

GOSSAMER_DEVICE int thread_index() { return threadIdx.x; }
GOSSAMER_DEVICE int block_index() { return blockIdx.x; }

// Addresses in shared memory are 32-bit numbers, of which the block's own begin at shared_memory().
GOSSAMER_DEVICE uint32_t shared_memory() {
    extern __shared__ __align__(128) char memory[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(memory));
}

template <int kOffset = 0>
GOSSAMER_DEVICE uint32_t load_shared(uint32_t address) {
    uint32_t value;
    asm volatile("ld.shared.u32 %0, [%1+%2];" : "=r"(value) : "r"(address), "n"(kOffset) : "memory");
    return value;
}

template <int kOffset = 0>
GOSSAMER_DEVICE Word4 load_shared4(uint32_t address) {
    Word4 value;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4+%5];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "r"(address), "n"(kOffset)
                 : "memory");
    return value;
}

GOSSAMER_DEVICE void store_shared(uint32_t address, uint32_t value) {
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(value) : "memory");
}

GOSSAMER_DEVICE void store_shared4(uint32_t address, Word4 value) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(value.x), "r"(value.y),
                 "r"(value.z), "r"(value.w)
                 : "memory");
}

// 16 bytes, both addresses multiples of 16; they are there once wait_copies says so to the lane that asked.
GOSSAMER_DEVICE void copy_to_shared(uint32_t shared, const void* global) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared), "l"(global) : "memory");
}

// Ends a group of this lane's copies, of which there may be none.
GOSSAMER_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kOpen of this lane's groups, the newest ones, are under way.
template <int kOpen>
GOSSAMER_DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(kOpen) : "memory");
}

GOSSAMER_DEVICE void sync_warp() { __syncwarp(); }
GOSSAMER_DEVICE void sync_block() { __syncthreads(); }
GOSSAMER_DEVICE uint32_t shuffle_up(uint32_t value, int by) { return __shfl_up_sync(~0u, value, by); }
GOSSAMER_DEVICE uint32_t shuffle_xor(uint32_t value, int by) { return __shfl_xor_sync(~0u, value, by); }

GOSSAMER_DEVICE int popcount(uint32_t value) { return __popc(value); }

// The low 32 bits of (high, low) moved right by shift mod 32.
GOSSAMER_DEVICE uint32_t funnel_right(uint32_t low, uint32_t high, uint32_t shift) {
    return __funnelshift_r(low, high, shift);
}

// Of the bytes 0 to 3 of `low` and 4 to 7 of `high` those that the four low nibbles of the selector name.
GOSSAMER_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
    return __byte_perm(low, high, selector);
}

GOSSAMER_DEVICE uint32_t bits_of(float value) { return __float_as_uint(value); }
GOSSAMER_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
GOSSAMER_DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
GOSSAMER_DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
GOSSAMER_DEVICE float to_float(int32_t value) { return __int2float_rn(value); }
GOSSAMER_DEVICE int32_t round_to_even(float value) { return __float2int_rn(value); }

// c [16 x 8] += a [16 x 32] b [32 x 8], as PTX's fragments of m16n8k32 lie in the lanes.
GOSSAMER_DEVICE void multiply_add(int32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, "
        "%1, %2, %3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same of bfloat16: c [16 x 8] += a [16 x 16] b [16 x 8], fragments of m16n8k16.
GOSSAMER_DEVICE void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

#endif
