// Elements of q, k, v, o in their own types, without the toolkit's headers. NaN and infinities that arrive from outside
// read as zero, as on the other paths.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define DTYPE_F32 0
#define DTYPE_F16 1
#define DTYPE_BF16 2

__device__ __forceinline__ float widen_half(u16 half) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(half));
    return wide;
}

__device__ __forceinline__ float widen_bf16(u16 half) {
    return __uint_as_float((u32)half << 16);
}

// Rounded to nearest, ties to even.
__device__ __forceinline__ u16 narrow_half(float wide) {
    u16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(wide));
    return half;
}

__device__ __forceinline__ u16 narrow_bf16(float wide) {
    u16 half;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(half) : "f"(wide));
    return half;
}

__device__ __forceinline__ bool is_finite(float x) {
    return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u;
}

__device__ __forceinline__ float finite_or_zero(float x) {
    return is_finite(x) ? x : 0.0f;
}

// Element `at` of an array of DTYPE, as it is.
template <int DTYPE> __device__ __forceinline__ float load_raw(const void* data, u64 at) {
    if constexpr (DTYPE == DTYPE_F32) {
        return ((const float*)data)[at];
    } else if constexpr (DTYPE == DTYPE_F16) {
        return widen_half(((const u16*)data)[at]);
    } else {
        return widen_bf16(((const u16*)data)[at]);
    }
}

// Element `at` of an array of DTYPE, zero where it is NaN or infinite.
template <int DTYPE> __device__ __forceinline__ float load(const void* data, u64 at) {
    return finite_or_zero(load_raw<DTYPE>(data, at));
}

template <int DTYPE> __device__ __forceinline__ void store(void* data, u64 at, float value) {
    if constexpr (DTYPE == DTYPE_F32) {
        ((float*)data)[at] = value;
    } else if constexpr (DTYPE == DTYPE_F16) {
        ((u16*)data)[at] = narrow_half(value);
    } else {
        ((u16*)data)[at] = narrow_bf16(value);
    }
}
