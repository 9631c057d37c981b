// Tiles of 32 rows by 32 keys for any shape, by 256 threads: a warp owns four rows, a lane one column, of keys or of
// channels.
#pragma once
#include "../window.cuh"

#define BLOCK 256
#define TILE 32

constexpr int OWN = (HEAD_DIM + 31) / 32;
constexpr int OWN_VALUES = (VALUE_DIM + 31) / 32;

// Slices of 32 channels of the two sides of a product, then the weights of 32 columns: [column][row].
struct Tile {
    float left[TILE][TILE + 4];
    float right[TILE][TILE + 1];
    float weights[TILE][TILE + 4];
};

__device__ __forceinline__ void four(float (&x)[4], const float *from) {
    for (int r = 0; r < 4; r++) x[r] = from[r];
}

// sums[r] += Σ over WIDTH channels of left row 4·warp + r and right row lane; `left_of` and `right_of` give an element of
// a row.
template <int WIDTH, class L, class R> __device__ __forceinline__ void add_product(Tile &tile, float (&sums)[4], L left_of, R right_of) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int slice = 0; slice < WIDTH; slice += TILE) {
        bool inside = slice + lane < WIDTH;
        barrier();
        for (int r = 0; r < 4; r++) {
            int row = warp * 4 + r;
            tile.left[lane][row] = inside ? left_of(row, slice + lane) : 0.0f;
            tile.right[row][lane] = inside ? right_of(row, slice + lane) : 0.0f;
        }
        barrier();
        for (int c = 0; c < TILE; c++) {
            float x[4], y = tile.right[lane][c];
            four(x, &tile.left[c][warp * 4]);
            for (int r = 0; r < 4; r++) sums[r] += x[r] * y;
        }
    }
}

// total[i][r] += Σ over `count` columns j of weights[j][4·warp + r] and channel i·32 + lane of row j.
template <int WIDTH, int N, class R> __device__ __forceinline__ void add_weighted(const Tile &tile, float (&total)[N][4], int count, R row_of) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    for (int j = 0; j < count; j++) {
        float x[4];
        four(x, &tile.weights[j][warp * 4]);
#pragma unroll
        for (int i = 0; i < N; i++) {
            int channel = i * 32 + lane;
            float y = channel < WIDTH ? row_of(j, channel) : 0.0f;
            for (int r = 0; r < 4; r++) total[i][r] += x[r] * y;
        }
    }
}

template <int N> __device__ __forceinline__ void clear_sums(float (&total)[N][4]) {
#pragma unroll
    for (int i = 0; i < N; i++) {
        for (int r = 0; r < 4; r++) total[i][r] = 0.0f;
    }
}
