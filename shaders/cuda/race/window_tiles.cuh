// Tiles of the window's rows in shared memory, for kernels on the tensor cores: 4 warps, each with 16 of a block's 64 rows,
// which walk through tiles of 32 rows of the other side.
#pragma once
#define THREADS 128
#define BF16_PARTS
#include "window.cuh"
#include "tiles.cuh"

#define OTHERS 32

// Inputs of 16 bits are kept as they are, those of 32 as three bf16 parts.
#if IN_TYPE == F32
#define IN_PARTS 3
template <int COUNT> using Keys = Parts<HEAD_DIM + 8, COUNT, 3>;
template <int COUNT> using Values = Parts<VALUE_DIM + 8, COUNT, 3>;
#else
#define IN_PARTS 1
template <int COUNT> using Keys = Input<HEAD_DIM + 8>;
template <int COUNT> using Values = Input<VALUE_DIM + 8>;
#endif
constexpr int KEY_STEPS = HEAD_DIM / 16;
constexpr int VALUE_STEPS = VALUE_DIM / 16;
template <int COUNT> constexpr int KEY_BYTES = COUNT * (HEAD_DIM + 8) * 2 * IN_PARTS;
template <int COUNT> constexpr int VALUE_BYTES = COUNT * (VALUE_DIM + 8) * 2 * IN_PARTS;

// Of WINDOW_STAGES tiles of the other side, the one that takes turn `tile`.
__device__ __forceinline__ u16 *keys_of(u16 *tiles, int tile) { return tiles + tile % WINDOW_STAGES * (KEY_BYTES<OTHERS> / 2); }
__device__ __forceinline__ u16 *values_of(u16 *tiles, int tile) { return tiles + tile % WINDOW_STAGES * (VALUE_BYTES<OTHERS> / 2); }

#if IN_TYPE == F32
// Eight channels at a time; `row_of` names a row, from nowhere where there is none: that becomes zero, as what is not
// finite does.
template <int WIDTH, int COUNT, class F> __device__ __forceinline__ void fetch_rows(u16 *to, const void *, F row_of) {
    constexpr int pieces = WIDTH / 8, together = 4;
    Parts<WIDTH + 8, COUNT, 3> rows{to};
#pragma unroll 1
    for (int base = threadIdx.x; base < COUNT * pieces; base += together * THREADS) {
        float x[together][8];
#pragma unroll
        for (int j = 0; j < together; j++) {
            int i = base + j * THREADS;
            Row row = i < COUNT * pieces ? row_of(i / pieces) : Row{nullptr, 0};
            float4 low = {0.0f, 0.0f, 0.0f, 0.0f}, high = low;
            if (row.from) {
                const float4 *from = (const float4 *)((const float *)row.from + row.at + i % pieces * 8);
                low = from[0];
                high = from[1];
            }
            x[j][0] = low.x, x[j][1] = low.y, x[j][2] = low.z, x[j][3] = low.w;
            x[j][4] = high.x, x[j][5] = high.y, x[j][6] = high.z, x[j][7] = high.w;
        }
#pragma unroll
        for (int j = 0; j < together; j++) {
            int i = base + j * THREADS;
            if (i >= COUNT * pieces) continue;
#pragma unroll
            for (int c = 0; c < 8; c++) x[j][c] = finite_or_zero(x[j][c]);
            rows.set_eight(i / pieces, i % pieces * 8, x[j]);
        }
    }
}

template <int WIDTH, int COUNT> __device__ __forceinline__ void fetch_line(u16 *to, Row row, i64 step) {
    fetch_rows<WIDTH, COUNT>(to, row.from, [&](int i) { return Row{row.from, row.at + i * step}; });
}

template <int WIDTH, int COUNT> __device__ __forceinline__ void clean_rows(u16 *) {}
#else
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

// The same for rows that lie `step` elements apart.
template <int WIDTH, int COUNT> __device__ __forceinline__ void fetch_line(u16 *to, Row row, i64 step) {
    constexpr int pieces = WIDTH / 8;
    if constexpr (THREADS % pieces == 0 && COUNT % (THREADS / pieces) == 0) {
        constexpr int rows = THREADS / pieces;
        int r = threadIdx.x / pieces, c = threadIdx.x % pieces * 8;
        const u16 *from = (const u16 *)row.from + row.at + r * step + c;
        to += r * (WIDTH + 8) + c;
#pragma unroll
        for (int i = 0; i < COUNT; i += rows) {
            copy_16(to + i * (WIDTH + 8), from, 16);
            from += rows * step;
        }
    } else {
        fetch_rows<WIDTH, COUNT>(to, row.from, [&](int i) { return Row{row.from, row.at + i * step}; });
    }
}

template <int WIDTH, int COUNT> __device__ __forceinline__ void clean_rows(u16 *tile) { clean<WIDTH, COUNT>(tile); }
#endif

// Before a tile of the other side is used: the one that is to follow it by WINDOW_STAGES − 1 is fetched, or itself.
template <class F, class C> __device__ __forceinline__ void next_tile(int tile, int tiles, F fetch, C clean_tile) {
    if constexpr (WINDOW_STAGES == 1) {
        barrier();
        fetch(tile);
        clean_tile();
        barrier();
    } else {
        copies_wait<WINDOW_STAGES - 2>();
        clean_tile();
        barrier();
        if (tile + WINDOW_STAGES - 1 < tiles) fetch(tile + WINDOW_STAGES - 1);
        copies_commit();
    }
}

// Keys and values from a position on, none of them after the last token.
__device__ __forceinline__ void fetch_keys(const Params &p, const Sequence &s, const Rows &rows, u16 *keys, u16 *values, const void *k, const void *v, const void *ring, int position) {
    if (position >= 0 && position + OTHERS - 1 <= rows.last_token) {
        fetch_line<HEAD_DIM, OTHERS>(keys, key_row(p, s, k, ring, rows.b, position, rows.head), p.k_token);
        fetch_line<VALUE_DIM, OTHERS>(values, value_row(p, s, v, ring, rows.b, position, rows.head), p.v_token);
        return;
    }
    Row none = {nullptr, 0};
    fetch_rows<HEAD_DIM, OTHERS>(keys, k, [&](int i) { return position + i <= rows.last_token ? key_row(p, s, k, ring, rows.b, position + i, rows.head) : none; });
    fetch_rows<VALUE_DIM, OTHERS>(values, v, [&](int i) { return position + i <= rows.last_token ? value_row(p, s, v, ring, rows.b, position + i, rows.head) : none; });
}

// Four elements, and back.
template <int TYPE> __device__ __forceinline__ void load_four(float (&x)[4], const void *from, i64 at) {
    if constexpr (TYPE == F32) {
        float4 y = *(const float4 *)((const float *)from + at);
        x[0] = y.x, x[1] = y.y, x[2] = y.z, x[3] = y.w;
    } else {
        uint2 y = *(const uint2 *)((const u16 *)from + at);
        float2 low = TYPE == BF16 ? bf16_floats(y.x) : f16_floats(y.x), high = TYPE == BF16 ? bf16_floats(y.y) : f16_floats(y.y);
        x[0] = low.x, x[1] = low.y, x[2] = high.x, x[3] = high.y;
    }
}
template <int TYPE> __device__ __forceinline__ void store_four(void *to, i64 at, const float (&x)[4]) {
    if constexpr (TYPE == F32) {
        *(float4 *)((float *)to + at) = float4{x[0], x[1], x[2], x[3]};
    } else {
        uint2 y;
        y.x = TYPE == BF16 ? bf16_pair(x[0], x[1]) : f16_pair(x[0], x[1]);
        y.y = TYPE == BF16 ? bf16_pair(x[2], x[3]) : f16_pair(x[2], x[3]);
        *(uint2 *)((u16 *)to + at) = y;
    }
}

// Where operands have several parts there are no registers to have more steps under way.
constexpr int STEPS_AT_ONCE = IN_TYPE == BF16 && TERMS == 1 ? 8 : 1;

// sums[n] += a's rows from m on times b's rows 8·n.., over STEPS steps of 16 channels.
template <int STEPS, int N, class A, class B> __device__ __forceinline__ void add_products(float (&sums)[N][4], const A &a, int m, const B &b) {
#pragma unroll STEPS_AT_ONCE
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
