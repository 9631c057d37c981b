// Products of tiles for any shape, by 256 threads on the tensor cores at the precision of f32: of each operand its
// rounding to TF32 and what that leaves, of their product all but the two rests.
//
// A tile of the result has M rows and N columns. Operands are given as functions (row or column, step) of their element,
// zero outside; a slice of steps of both is in shared memory at a time. An operand is ALONG where its elements of
// neighbouring steps are neighbours in memory, and not where those of neighbouring rows or columns are.
#pragma once
#include "any.cuh"

#ifndef PRODUCT_THREADS
#define PRODUCT_THREADS 256
#endif
#ifndef PRODUCT_BLOCKS
// Blocks of a multiprocessor: sums that are added up from short ones need more registers.
#define PRODUCT_BLOCKS (HEAD_DIM > 128 || VALUE_DIM > 128 || BUCKETS > 128 || GROUP > 2 ? 2 : 3)
#endif
#ifndef SLICE
#define SLICE 16
#endif
// The most columns of a tile, and the most rows of one of buckets or bits. The Rust twins are in src/race/cuda/any.rs.
#ifndef MOST_COLUMNS
#define MOST_COLUMNS 64
#endif
constexpr int MOST_ROWS = 80;

__host__ __device__ constexpr int tiles_of(int all, int most) { return (all + most - 1) / most; }
// Of `all` in as few tiles as there can be, each a multiple of sixteen.
__host__ __device__ constexpr int tile_of(int all, int most) { return (tiles_of(all, tiles_of(all, most)) + 15) / 16 * 16; }

template <int N> constexpr int SIDE = N * (SLICE + 4) + 192;

// Where the slice of an operand keeps an element: no bank twice, neither when it is filled nor when fragments are read.
template <int N, bool ALONG> __device__ __forceinline__ int place_in(int i, int k) { return ALONG ? i * (SLICE + 4) + k : k * (N + 8) + i; }
// The thread's `e`-th element of a slice; `thread` is its number.
template <int N, bool ALONG> __device__ __forceinline__ void element_in(int thread, int e, int &i, int &k) {
    int at = thread + e * PRODUCT_THREADS;
    i = ALONG ? thread / SLICE + e * (PRODUCT_THREADS / SLICE) : at % N;
    k = ALONG ? thread % SLICE : at / N;
}

// What becomes of an element once it has arrived: until then nobody waits for it. Of the kernels' own arrays it stays.
struct AsItIs {
    __device__ __forceinline__ float operator()(int, float x) const { return x; }
};
struct Finite {
    __device__ __forceinline__ float operator()(int, float x) const { return finite_or_zero(x); }
};

// ROW_WARPS of the block's eight warps share the rows.
template <int M, int N, int ROW_WARPS> struct Product {
    static constexpr int COLUMN_WARPS = PRODUCT_THREADS / 32 / ROW_WARPS;
    static constexpr int OWN_ROWS = M / ROW_WARPS, OWN_COLUMNS = N / COLUMN_WARPS;
    static_assert(OWN_ROWS % 16 == 0 && OWN_COLUMNS % 8 == 0 && M % 16 == 0 && N % 16 == 0, "whole fragments");
    static constexpr int LEFTS = M * SLICE / PRODUCT_THREADS, RIGHTS = N * SLICE / PRODUCT_THREADS;
    static constexpr int ROOM = SIDE<M> + SIDE<N>;
    float sums[OWN_ROWS / 16][OWN_COLUMNS / 8][4];

    __device__ __forceinline__ Product() {
#pragma unroll
        for (int i = 0; i < OWN_ROWS / 16; i++) {
#pragma unroll
            for (int j = 0; j < OWN_COLUMNS / 8; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) sums[i][j][e] = 0.0f;
            }
        }
    }
    __device__ __forceinline__ static int first_row() { return (threadIdx.x >> 5) / COLUMN_WARPS * OWN_ROWS; }
    __device__ __forceinline__ static int first_column() { return (threadIdx.x >> 5) % COLUMN_WARPS * OWN_COLUMNS; }

    // Calls work(row, column, sum) for every element that the thread has.
    template <class F> __device__ __forceinline__ void each(F work) {
        int lane = opaque(threadIdx.x & 31);
#pragma unroll
        for (int i = 0; i < OWN_ROWS / 16; i++) {
#pragma unroll
            for (int j = 0; j < OWN_COLUMNS / 8; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) work(first_row() + i * 16 + lane / 4 + (e >> 1) * 8, first_column() + j * 8 + lane % 4 * 2 + (e & 1), sums[i][j][e]);
            }
        }
    }

    // Calls work(row, column, sum, sum of the next column) for every pair of columns that the thread has.
    template <class F> __device__ __forceinline__ void pairs(F work) {
        int lane = opaque(threadIdx.x & 31);
#pragma unroll
        for (int i = 0; i < OWN_ROWS / 16; i++) {
#pragma unroll
            for (int e = 0; e < 4; e += 2) {
#pragma unroll
                for (int j = 0; j < OWN_COLUMNS / 8; j++) work(first_row() + i * 16 + lane / 4 + e * 4, first_column() + j * 8 + lane % 4 * 2, sums[i][j][e], sums[i][j][e + 1]);
            }
        }
    }

    // Adds Σ over `steps` of left(row, step)·right(column, step). The tensor cores cut off what a sum has no bits for, all
    // one way: LONG sums are added up from short ones.
    template <bool LEFT_ALONG, bool RIGHT_ALONG, bool LONG = false, class L, class R, class OfLeft = AsItIs, class OfRight = AsItIs>
    __device__ __forceinline__ void add(float *room, int steps, L left, R right, OfLeft of_left = {}, OfRight of_right = {}) {
        float *lefts = room, *rights = room + SIDE<M>;
        float next_left[LEFTS], next_right[RIGHTS];
        auto fetch = [&](int first) {
            int thread = opaque(threadIdx.x);
#pragma unroll
            for (int e = 0; e < LEFTS; e++) {
                int i, k;
                element_in<M, LEFT_ALONG>(thread, e, i, k);
                next_left[e] = first + k < steps ? left(i, first + k) : 0.0f;
            }
#pragma unroll
            for (int e = 0; e < RIGHTS; e++) {
                int i, k;
                element_in<N, RIGHT_ALONG>(thread, e, i, k);
                next_right[e] = first + k < steps ? right(i, first + k) : 0.0f;
            }
        };
        fetch(0);
        Product part;
        auto &of_slice = LONG ? part.sums : sums;
#pragma unroll 1
        for (int first = 0; first < steps; first += SLICE) {
            // Everyone is done with the slice before.
            barrier();
#pragma unroll
            for (int e = 0; e < LEFTS; e++) {
                int i, k;
                element_in<M, LEFT_ALONG>(threadIdx.x, e, i, k);
                lefts[place_in<M, LEFT_ALONG>(i, k)] = of_left(i, next_left[e]);
            }
#pragma unroll
            for (int e = 0; e < RIGHTS; e++) {
                int i, k;
                element_in<N, RIGHT_ALONG>(threadIdx.x, e, i, k);
                rights[place_in<N, RIGHT_ALONG>(i, k)] = of_right(i, next_right[e]);
            }
            barrier();
            if (first + SLICE < steps) fetch(first + SLICE);
            int row = first_row() + (threadIdx.x >> 2 & 7), column = first_column() + (threadIdx.x >> 2 & 7), step = threadIdx.x & 3;
#pragma unroll
            for (int k = 0; k < SLICE; k += 8) {
                u32 high[OWN_ROWS / 16][4], rest[OWN_ROWS / 16][4];
#pragma unroll
                for (int i = 0; i < OWN_ROWS / 16; i++) {
#pragma unroll
                    for (int e = 0; e < 4; e++) split_tf32(high[i][e], rest[i][e], lefts[place_in<M, LEFT_ALONG>(row + i * 16 + (e & 1) * 8, k + step + (e >> 1) * 4)]);
                }
#pragma unroll
                for (int j = 0; j < OWN_COLUMNS / 8; j++) {
                    u32 of_high[2], of_rest[2];
#pragma unroll
                    for (int e = 0; e < 2; e++) split_tf32(of_high[e], of_rest[e], rights[place_in<N, RIGHT_ALONG>(column + j * 8, k + step + e * 4)]);
// Not one after another into the same sum.
#pragma unroll
                    for (int i = 0; i < OWN_ROWS / 16; i++) mma_tf32(of_slice[i][j], rest[i], of_high);
#pragma unroll
                    for (int i = 0; i < OWN_ROWS / 16; i++) mma_tf32(of_slice[i][j], high[i], of_rest);
#pragma unroll
                    for (int i = 0; i < OWN_ROWS / 16; i++) mma_tf32(of_slice[i][j], high[i], of_high);
                }
            }
            if (LONG && (first / SLICE % 4 == 3 || first + SLICE >= steps)) {
#pragma unroll
                for (int i = 0; i < OWN_ROWS / 16; i++) {
#pragma unroll
                    for (int j = 0; j < OWN_COLUMNS / 8; j++) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            sums[i][j][e] += part.sums[i][j][e];
                            part.sums[i][j][e] = 0.0f;
                        }
                    }
                }
            }
        }
    }
};
// Steps that a sum on the tensor cores may have.
constexpr int SHORT = 128;

// Two neighbours of a row of WIDTH elements, of which there may be one only; rows are apart by multiples of WIDTH.
template <int WIDTH> __device__ __forceinline__ void put_pair(float *to, float x, float y, bool both) {
    if constexpr (WIDTH % 2 == 0) {
        float2 pair = {x, y};
        *(float2 *)to = pair;
    } else {
        to[0] = x;
        if (both) to[1] = y;
    }
}

// Sums of M rows' elements over `steps` by the whole block, whose threads take some steps each: work(row, sum).
template <int M, class F, class W> __device__ __forceinline__ void sum_rows(float *room, int steps, F element, W work) {
    constexpr int PARTS = PRODUCT_THREADS / M;
    int row = threadIdx.x % M, part = threadIdx.x / M;
    float sum = 0.0f;
#pragma unroll 8
    for (int i = part; part < PARTS && i < steps; i += PARTS) sum += element(row, i);
    barrier();
    if (part < PARTS) room[threadIdx.x] = sum;
    barrier();
    if (part > 0) return;
    for (int i = 1; i < PARTS; i++) sum += room[i * M + row];
    work(row, sum);
}

// Products whose rows are a chunk's tokens.
template <int N> using OfRows = Product<CHUNK, N, PRODUCT_THREADS == 128 || N % 32 == 0 ? 2 : 4>;
// Products whose rows are buckets or bits, and whose columns are channels.
template <int M, int N> using OfBuckets = Product<M, N, 1>;
__host__ __device__ constexpr int wide_tile(int all) { return all <= 64 ? 64 : MOST_COLUMNS; }
