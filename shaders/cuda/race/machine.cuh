// Types and instructions, in one place: kernels see PTX through these alone. No header of the toolkit is needed.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Element types.
#define F32 0
#define F16 1
#define BF16 2

#ifndef EMULATED
#define SHARED_BYTES extern __shared__ __align__(128) u8 shared_bytes[]

__device__ __forceinline__ u32 shared_address(const void *p) { return (u32)__cvta_generic_to_shared(p); }

// D += A·B of 16 x 8 x 16, bf16 operands, f32 sums.
__device__ __forceinline__ void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// D += A·B of 16 x 8 x 8 in TF32: of the operands only the upper 19 bits count; f32 sums.
__device__ __forceinline__ void mma_tf32(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four matrices of 8 x 8 elements of 16 bits; lane i names a row of matrix i / 8, in bytes from `base` on.
__device__ __forceinline__ void load_matrices(u32 (&r)[4], const void *base, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(base) + at)
                 : "memory");
}

__device__ __forceinline__ void load_matrices_turned(u32 (&r)[4], const void *base, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(base) + at)
                 : "memory");
}

// Sixteen bytes to shared memory while other work goes on; the bytes past `bytes` become zero.
__device__ __forceinline__ void copy_16(void *to, const void *from, u32 bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}

// The same of 4 or 8 bytes.
template <int SIZE> __device__ __forceinline__ void copy_few(void *to, const void *from, u32 bytes) {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes), "n"(SIZE) : "memory");
}

__device__ __forceinline__ void copies_done() { asm volatile("cp.async.wait_all;" ::: "memory"); }
// A group of copies ends; all groups but the last LEFT are there.
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int LEFT> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory"); }

// Asks for a line of memory to come nearer.
__device__ __forceinline__ void prefetch(const void *at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

__device__ __forceinline__ void barrier() { __syncthreads(); }
// A barrier that tells whether any thread said so.
__device__ __forceinline__ bool barrier_or(bool x) { return __syncthreads_or(x); }
__device__ __forceinline__ void warp_barrier() { __syncwarp(); }
__device__ __forceinline__ bool any_of_warp(bool x) { return __any_sync(0xffffffffu, x); }
// The warp's place in its block, known to be the same in all its lanes.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, (int)(threadIdx.x >> 5), 0); }
__device__ __forceinline__ float from_lane(float x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ double from_lane(double x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
__device__ __forceinline__ float of_lane(float x, u32 lane) { return __shfl_sync(0xffffffffu, x, lane); }
__device__ __forceinline__ u32 from_lane(u32 x, u32 mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }

// Of the sizes of two floats, or of two pairs of 16-bit floats, the larger; NaN where either is. The first is a size.
template <int TYPE> __device__ __forceinline__ u32 larger_sizes(u32 a, u32 b) {
    u32 r;
    if (TYPE == F32) r = a > (b & 0x7fffffffu) ? a : b & 0x7fffffffu;
    else if (TYPE == BF16) asm("{.reg .b32 x; abs.bf16x2 x, %2; max.NaN.bf16x2 %0, %1, x;}" : "=r"(r) : "r"(a), "r"(b));
    else asm("{.reg .b32 x; abs.f16x2 x, %2; max.NaN.f16x2 %0, %1, x;}" : "=r"(r) : "r"(a), "r"(b));
    return r;
}

// Two floats as bf16, rounded to nearest; `low` in the low half.
__device__ __forceinline__ u32 bf16_pair(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ u32 f16_pair(float low, float high) {
    u32 r;
    asm("{.reg .b16 l, h; cvt.rn.f16.f32 l, %1; cvt.rn.f16.f32 h, %2; mov.b32 %0, {l, h};}" : "=r"(r) : "f"(low), "f"(high));
    return r;
}

__device__ __forceinline__ float2 f16_floats(u32 pair) {
    float2 r;
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}" : "=f"(r.x), "=f"(r.y) : "r"(pair));
    return r;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
}
// Adds one after all that the block did before; gives the count before.
__device__ __forceinline__ u32 count_up(u32 *counter) {
    __threadfence();
    return atomicAdd(counter, 1u);
}
// A number that nothing is known of: what is made of it is not kept in registers from one round of a loop to the next.
__device__ __forceinline__ int opaque(int x) {
    asm volatile("" : "+r"(x));
    return x;
}
// x / y to two units in the last place, for y below 2^126.
__device__ __forceinline__ float quotient(float x, float y) { return __fdividef(x, y); }
// 1 / x to some units in the last place, for x that is normal, without the branches and registers of a call.
__device__ __forceinline__ double inverse(double x) {
    double r;
    asm("rcp.approx.ftz.f64 %0, %1;" : "=d"(r) : "d"(x));
    // From 20 bits to 40 and 80.
    r = fma(r, fma(-x, r, 1.0), r);
    return fma(r, fma(-x, r, 1.0), r);
}
__device__ __forceinline__ u32 bits_of(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float float_of(u32 x) { return __uint_as_float(x); }
#endif

__device__ __forceinline__ float2 bf16_floats(u32 pair) {
    float2 r;
    r.x = float_of(pair << 16);
    r.y = float_of(pair & 0xffff0000u);
    return r;
}

// Those of a pair of 16-bit floats that are NaN or infinite, as the top bits of their halves; of a float, its own top bit.
template <int TYPE> __device__ __forceinline__ u32 not_finite(u32 pair) {
    if (TYPE == F32) return ((pair & 0x7f800000u) + 0x00800000u) & 0x80000000u;
    return TYPE == BF16 ? ((pair & 0x7f807f80u) + 0x00800080u) & 0x80008000u : ((pair & 0x7c007c00u) + 0x04000400u) & 0x80008000u;
}
// A float or such a pair with zeros in the place of those.
template <int TYPE> __device__ __forceinline__ u32 finite_word(u32 pair) {
    u32 bad = not_finite<TYPE>(pair);
    if (TYPE == F32) return bad ? 0u : pair;
    return pair & ~((bad & 0x8000u ? 0xffffu : 0u) | (bad & 0x80000000u ? 0xffff0000u : 0u));
}

// The two parts of a number: the first is rounded to nearest; of the second, which has either sign, the tensor cores cut off
// what they have no bits for.
__device__ __forceinline__ void split_tf32(u32 &high, u32 &rest, float x) {
    high = (bits_of(x) + 0x1000u) & 0xffffe000u;
    rest = bits_of(x - float_of(high));
}

#ifdef TABLES
// Sizes of what is hashed: of one ensemble.
constexpr int RADIX = 1 << PLANES;
constexpr int BUCKETS = TABLES * RADIX;
constexpr int BITS = TABLES * PLANES;
constexpr int COLUMNS = VALUE_DIM + 1;
constexpr int MATRIX = (BUCKETS + 1) * COLUMNS;
#endif
