// Tiles in shared memory and fragments of them in registers, for kernels of 256 threads that walk through a sequence in
// tiles of 64 tokens.
//
// What is computed is kept in TERMS parts, each the rounding of what the ones before it leave; a product takes the pairs
// of parts that count. Where inputs have 16 bits the parts are bf16 and a tile keeps each of them apart; where they are f32
// a tile keeps the numbers, of which fragments make two parts of TF32.
#pragma once
#include "machine.cuh"

#ifndef THREADS
#define THREADS 256
#endif
#define ROWS 64
// Tiles kept of the input that the backward kernels read last, q or k.
#ifndef LATE_STAGES
#define LATE_STAGES STAGES
#endif
#ifdef TABLES
constexpr int BUCKETS_UP = BUCKETS <= 16 ? 16 : BUCKETS <= 32 ? 32 : BUCKETS <= 64 ? 64 : 128;
constexpr int BITS_UP = (BITS + 15) / 16 * 16;
constexpr int PLANE_TERMS = TERMS < 2 ? 2 : TERMS;
#endif

__device__ __forceinline__ void clear(float (&x)[4]) {
#pragma unroll
    for (int i = 0; i < 4; i++) x[i] = 0.0f;
}
template <int N> __device__ __forceinline__ void clear(float (&x)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) clear(x[i]);
}

// Sum over the four lanes that share a row.
__device__ __forceinline__ float row_sum(float x) {
    x += from_lane(x, 1);
    return x + from_lane(x, 2);
}

// Kernels of the window take f32 in bf16 parts too.
#if IN_TYPE == F32 && !defined BF16_PARTS
#include "fragments_tf32.cuh"
#else
#include "fragments_bf16.cuh"
#endif

// Adds left·right over a tile's rows, sixteen at a time, to the first `columns` of N tiles of eight: left_at(row),
// right_at(row, column). What else is made of the left side: also(row, left).
template <int N, class L, class R, class W>
__device__ __forceinline__ void add_over_rows(float (&sums)[N][4], int columns, L left_at, R right_at, W also) {
    float parts[N][4];
    clear(parts);
    auto &of_tile = SHORT_SUMS ? parts : sums;
#pragma unroll WRITTEN_OUT
    for (int k = 0; k < ROWS; k += 16) {
        auto a = left_at(k);
#pragma unroll
        for (int c = 0; c < N * 8; c += 16) {
            if (c < columns) multiply(of_tile[c / 8], of_tile[c / 8 + 1], a, right_at(k, c));
        }
        also(k, a);
    }
    if constexpr (SHORT_SUMS) {
#pragma unroll
        for (int c = 0; c < N; c++) {
#pragma unroll
            for (int i = 0; i < 4; i++) sums[c][i] += parts[c][i];
        }
    }
}

// Elements of sixteen bytes.
constexpr int PIECE = 16 / sizeof(Element);

// Rows of an input with WIDTH channels, by N threads side by side; rows from `count` on are zero.
template <int WIDTH, int N = THREADS> __device__ __forceinline__ void fetch(Element *to, const Element *from, i64 row_step, int count) {
    constexpr int pieces = WIDTH / PIECE;
    if constexpr (N % pieces == 0) {
        // Each thread takes the same sixteen bytes of every STEPth row.
        constexpr int step = N / pieces;
        int r = threadIdx.x % N / pieces, c = threadIdx.x % pieces * PIECE;
        const u8 *source = (const u8 *)(from + (r * row_step + c));
        row_step *= step * sizeof(Element);
        // A copy of no bytes reads nothing, wherever it is from.
#pragma unroll
        for (int i = 0; i < ROWS; i += step) {
            copy_16(to + place<pitch_of(WIDTH)>(r + i, c), source, r + i < count ? 16u : 0u);
            source += row_step;
        }
    } else {
        for (int i = threadIdx.x % N; i < ROWS * pieces; i += N) {
            int r = i / pieces, c = i % pieces * PIECE;
            copy_16(to + place<pitch_of(WIDTH)>(r, c), from + (r < count ? r * row_step + c : 0), r < count ? 16u : 0u);
        }
    }
}

// Once the copies of this one of N threads have arrived: NaN and infinities among them read as zero. Whether there were any.
template <int WIDTH, int COUNT = ROWS, int N = THREADS> __device__ __forceinline__ bool clean(Element *tile) {
    constexpr int pieces = WIDTH / PIECE;
    u32 largest = 0;
#pragma unroll
    for (int i = threadIdx.x % N; i < COUNT * pieces; i += N) {
        uint4 w = *(const uint4 *)(tile + place<pitch_of(WIDTH)>(i / pieces, i % pieces * PIECE));
        largest = larger_sizes<IN_TYPE>(larger_sizes<IN_TYPE>(largest, w.x), w.y);
        largest = larger_sizes<IN_TYPE>(larger_sizes<IN_TYPE>(largest, w.z), w.w);
    }
    if (!not_finite<IN_TYPE>(largest)) return false;
#pragma unroll 1
    for (int i = threadIdx.x % N; i < COUNT * pieces; i += N) {
        u32 *w = (u32 *)(tile + place<pitch_of(WIDTH)>(i / pieces, i % pieces * PIECE));
        for (int j = 0; j < 4; j++) w[j] = finite_word<IN_TYPE>(w[j]);
    }
    return true;
}

// The same of a warp's own sixteen rows from `row` on, once it is known that there are some.
template <int WIDTH> __device__ __forceinline__ void clean_sixteen(Element *tile, int row) {
    constexpr int words = WIDTH * sizeof(Element) / 4;
    warp_barrier();
#pragma unroll 1
    for (int i = threadIdx.x & 31; i < 16 * words; i += 32) {
        u32 *w = (u32 *)(tile + place<pitch_of(WIDTH)>(row + i / words, i % words * (4 / (int)sizeof(Element))));
        *w = finite_word<IN_TYPE>(*w);
    }
    warp_barrier();
}
// Whether sums of products of one row with anything, two rows of a lane, tell of a NaN or an infinity in those rows: of
// the warp's. (Sums of what is finite may have become infinite: then too.)
__device__ __forceinline__ bool not_finite_sums(const float (&sums)[4]) {
    constexpr u32 mask = 0x7f800000u;
    return any_of_warp((bits_of(sums[0]) & mask) == mask || (bits_of(sums[2]) & mask) == mask);
}

// Where shared memory goes, in order.
struct Carve {
    u8 *at;
    template <class T> __device__ __forceinline__ T *take(int bytes) {
        T *here = (T *)at;
        at += (bytes + 127) / 128 * 128;
        return here;
    }
};
