// Types, conversions and the few instructions that C++ has no words for. NVRTC is given no headers of the toolkit.
#pragma once
#include "numbers.cuh"

typedef long long i64;

#define FULL_WARP 0xffffffffu
#define LOG2_E 1.4426950408889634f
#define LN_2 0.6931471805599453f

__device__ __forceinline__ u32 min_u32(u32 a, u32 b) { return a < b ? a : b; }
__device__ __forceinline__ u32 max_u32(u32 a, u32 b) { return a > b ? a : b; }
__device__ __forceinline__ u32 float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(u32 x) { return __uint_as_float(x); }

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

// A quotient to two units in the last place, without the branches of the exact one.
__device__ __forceinline__ float divide(float x, float y) {
    float q;
    asm("div.full.f32 %0, %1, %2;" : "=f"(q) : "f"(x), "f"(y));
    return q;
}

template <int DTYPE> __device__ __forceinline__ float widen(u32 bits) {
    if (DTYPE == DTYPE_F32) return bits_float(bits);
    if (DTYPE == DTYPE_BF16) return bits_float(bits << 16);
    float y;
    u16 half = (u16)bits;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(half));
    return y;
}

// To nearest, ties to even; infinities and NaN stay such.
template <int DTYPE> __device__ __forceinline__ u32 narrow(float x) {
    if (DTYPE == DTYPE_F32) return float_bits(x);
    u16 y;
    if (DTYPE == DTYPE_BF16) asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    else asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

template <int DTYPE> __device__ __forceinline__ u32 pack_pair(float low, float high) {
    u32 y;
    if (DTYPE == DTYPE_BF16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

template <int DTYPE> struct Element { typedef u16 stored; };
template <> struct Element<DTYPE_F32> { typedef u32 stored; };

template <int DTYPE> __device__ __forceinline__ bool is_finite(u32 bits) {
    if (DTYPE == DTYPE_F32) return (bits & 0x7f800000u) != 0x7f800000u;
    if (DTYPE == DTYPE_BF16) return (bits & 0x7f80u) != 0x7f80u;
    return (bits & 0x7c00u) != 0x7c00u;
}

// Element `at` of an input; what is not finite reads as zero.
template <int DTYPE> __device__ __forceinline__ float input_element(const void* data, i64 at) {
    u32 bits = ((const typename Element<DTYPE>::stored*)data)[at];
    return is_finite<DTYPE>(bits) ? widen<DTYPE>(bits) : 0.0f;
}

template <int DTYPE> __device__ __forceinline__ void store_element(void* data, i64 at, float value) {
    ((typename Element<DTYPE>::stored*)data)[at] = (typename Element<DTYPE>::stored)narrow<DTYPE>(value);
}

// d += a·b for a 16 by 16 tile of a, 16 by 8 of b: rows of d are lane / 4 and that plus 8.
template <int DTYPE> __device__ __forceinline__ void mma16(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    if (DTYPE == DTYPE_BF16)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same for 16 by 32 bytes of a, unsigned, and 32 by 8 of b, signed, exactly.
__device__ __forceinline__ void mma_bytes(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 shared_address(const void* pointer) { return (u32)__cvta_generic_to_shared(pointer); }

__device__ __forceinline__ void load_matrices(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

__device__ __forceinline__ void load_matrices_transposed(u32 (&r)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(address) : "memory");
}

// 16 bytes of shared memory.
__device__ __forceinline__ uint4 load_four(u32 address) {
    uint4 x;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w) : "r"(address) : "memory");
    return x;
}
__device__ __forceinline__ void store_four(u32 address, const uint4& x) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w) : "memory");
}

// Copies 16 bytes to shared memory in the background; zeros where not `valid`.
__device__ __forceinline__ void copy_piece(u32 to, u64 from, bool valid) {
    u32 bytes = valid ? 16 : 0;
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// With programmatic launches: what follows waits for the kernels before; without, nothing.
__device__ __forceinline__ void wait_for_earlier() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_later_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Whether this block is the last of `blocks` to arrive at a counter, which is zero again then. Called by all threads;
// what they wrote before is visible to the last block afterwards.
__device__ __forceinline__ bool is_last(u32* counter, u32 blocks) {
    __shared__ u32 arrived;
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) {
        arrived = atomicAdd(counter, 1u);
        if (arrived + 1 == blocks) *counter = 0;
    }
    __syncthreads();
    bool last = arrived + 1 == blocks;
    if (last) __threadfence();
    return last;
}

__device__ __forceinline__ float warp_sum(float x) {
    for (u32 step = 16; step > 0; step >>= 1) x += __shfl_xor_sync(FULL_WARP, x, step);
    return x;
}

// Inclusive prefix sum over a block of WARPS warps; `total` is the sum of all. Called by all threads.
template <int WARPS> __device__ __forceinline__ u32 block_scan(u32 value, u32& total) {
    __shared__ u32 sums[WARPS];
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (u32 step = 1; step < 32; step <<= 1) {
        u32 below = __shfl_up_sync(FULL_WARP, value, step);
        if (lane >= step) value += below;
    }
    __syncthreads();
    if (lane == 31) sums[warp] = value;
    __syncthreads();
    u32 before = 0, all = 0;
#pragma unroll
    for (u32 w = 0; w < WARPS; w++) {
        u32 sum = sums[w];
        if (w < warp) before += sum;
        all += sum;
    }
    total = all;
    return value + before;
}
