// Tiles of the window's rows in shared memory, for kernels on the tensor cores: 4 warps, each with 16 of a block's 64 rows,
// which walk through tiles of 32 rows of the other side.
#pragma once
#define THREADS 128
#include "window.cuh"
#include "tiles.cuh"

#define OTHERS 32
#ifndef WINDOW_BLOCKS
#define WINDOW_BLOCKS 1
#endif

typedef Input<HEAD_DIM + 8> Keys;
typedef Input<VALUE_DIM + 8> Values;
constexpr int KEY_STEPS = HEAD_DIM / 16;
constexpr int VALUE_STEPS = VALUE_DIM / 16;
template <int COUNT> constexpr int KEY_BYTES = COUNT * (HEAD_DIM + 8) * 2;
template <int COUNT> constexpr int VALUE_BYTES = COUNT * (VALUE_DIM + 8) * 2;

// Of two tiles of the other side, the one that takes turn `tile`.
__device__ __forceinline__ u16 *keys_of(u16 *tiles, int tile) { return tiles + (tile & 1) * (KEY_BYTES<OTHERS> / 2); }
__device__ __forceinline__ u16 *values_of(u16 *tiles, int tile) { return tiles + (tile & 1) * (VALUE_BYTES<OTHERS> / 2); }

// Sixteen bytes at a time; `row_of` names a row, from nowhere where there is none: that becomes zero.
template <int WIDTH, int COUNT, class F> __device__ __forceinline__ void fetch_rows(u16 *to, const void *somewhere, F row_of) {
    constexpr int pieces = WIDTH / 8;
#pragma unroll
    for (int i = threadIdx.x; i < COUNT * pieces; i += THREADS) {
        int r = i / pieces, c = i % pieces * 8;
        Row row = row_of(r);
        copy_16(to + r * (WIDTH + 8) + c, row.from ? (const u16 *)row.from + row.at + c : (const u16 *)somewhere, row.from ? 16u : 0u);
    }
}

// sums[n] += the block's own rows, as fragments, times b's rows 8·n...
template <int STEPS, int N, int T, class B> __device__ __forceinline__ void add_products(float (&sums)[N][4], const Left<T> (&a)[STEPS], const B &b) {
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
#pragma unroll
        for (int n = 0; n < N; n += 2) multiply(sums[n], sums[n + 1], a[k], right(b, n * 8, k * 16));
    }
}

// sums[n] += a's rows from m on times b's rows 8·n.., over STEPS steps of 16 channels.
template <int STEPS, int N, class A, class B> __device__ __forceinline__ void add_products(float (&sums)[N][4], const A &a, int m, const B &b) {
#pragma unroll
    for (int k = 0; k < STEPS; k++) {
        Left<A::terms> x = left(a, m, k * 16);
#pragma unroll
        for (int n = 0; n < N; n += 2) multiply(sums[n], sums[n + 1], x, right(b, n * 8, k * 16));
    }
}

// sums[n] += weights (16 rows, 8·M columns) times b's channels 8·n.., b's rows being the weights' columns.
template <int M, int N, class B> __device__ __forceinline__ void add_weighted(float (&sums)[N][4], const float (&weights)[M][4], const B &b) {
#pragma unroll
    for (int k = 0; k < M; k += 2) {
        Left<TERMS> x = as_left<TERMS>(weights[k], weights[k + 1]);
#pragma unroll
        for (int n = 0; n < N; n += 2) multiply(sums[n], sums[n + 1], x, right_turned(b, k * 8, n * 8));
    }
}

// A query row of q or of the gradient of o.
__device__ __forceinline__ Row query_row(const Params &p, const void *q, int b, int token, int head) {
    return {q, b * p.q_batch + token * p.q_token + head * p.q_head};
}
__device__ __forceinline__ Row grad_row(const Params &p, const void *grad_o, int b, int token, int head) {
    return {grad_o, b * p.g_batch + token * p.g_token + head * p.g_head};
}
