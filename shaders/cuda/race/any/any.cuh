// What kernels for any shape share. They work on a piece: `tokens` tokens of `batch` sequences in `heads` kv heads from
// `head` on, in one ensemble, cut into chunks of 64 tokens; one thread makes one element, or one block one row. Rows of
// keys are (sequence, token, head of the piece), those of queries have all heads of the group in the place of one.
//
// α = R·φ − c; matrices are [α, 1]ᵀ[v, 1], as in `Carried`.
#pragma once
#include "../machine.cuh"
#include "common/numbers.cuh"

#define CHUNK 64
#define BLOCK 256
constexpr float EPSILON = 1e-6f * RADIX;

// The Rust twin is `Piece` in src/race/cuda/params.rs.
struct Piece {
    // Elements from a sequence, a token, a head to the next: of the first input, and of the second.
    i64 x_batch, x_token, x_head;
    i64 y_batch, y_token, y_head;
    // Of the result: elements from a sequence to the next; a token's are all heads of the tensor.
    i64 out_batch, out_token;
    // Elements from one kv head's hyperplanes to the next's.
    i64 planes_step;
    u32 batch, tokens, head, heads;
    // Chunks of a sequence, and matrices.
    u32 chunks, slots;
    // See the kernels; rows of a share.
    u32 flags, share;
    float scale;
    u32 reserved;
};

// The thread's element, if it is one of `count`.
__device__ __forceinline__ bool element_of(i64 &at, i64 count) {
    at = (i64)blockIdx.x * BLOCK + threadIdx.x;
    return at < count;
}

struct Place {
    int b, token, head, in_group;
};
// Of row `row` with `per_head` rows for each kv head.
__device__ __forceinline__ Place place_of(const Piece &p, u32 row, int per_head) {
    Place x;
    x.in_group = row % per_head;
    x.head = row / per_head % p.heads;
    x.token = row / per_head / p.heads % p.tokens;
    x.b = row / per_head / p.heads / p.tokens;
    return x;
}
__device__ __forceinline__ i64 x_at(const Piece &p, const Place &r, int per_head) {
    return r.b * p.x_batch + r.token * p.x_token + ((p.head + r.head) * per_head + r.in_group) * p.x_head;
}
__device__ __forceinline__ i64 y_at(const Piece &p, const Place &r, int per_head) {
    return r.b * p.y_batch + r.token * p.y_token + ((p.head + r.head) * per_head + r.in_group) * p.y_head;
}
__device__ __forceinline__ i64 out_at(const Piece &p, const Place &r, int per_head, int width) {
    return r.b * p.out_batch + r.token * p.out_token + ((p.head + r.head) * per_head + r.in_group) * (i64)width;
}
// Row of the key that stands `step` tokens after the chunk's first, and of a query.
__device__ __forceinline__ i64 key_row(const Piece &p, const Place &r, int token) {
    return ((i64)r.b * p.tokens + token) * p.heads + r.head;
}
// The matrix of the row's chunk; one alone for a unit where `slots` is 1.
__device__ __forceinline__ i64 matrix_at(const Piece &p, const Place &r) {
    i64 chunk = r.token / CHUNK < (int)p.slots ? r.token / CHUNK : (int)p.slots - 1;
    return (((i64)r.b * p.heads + r.head) * p.slots + chunk) * MATRIX;
}

// A chunk of a unit (sequence and head), which a block works on: tokens `first` up to `end`, or those of its tensors up to
// `last`. Blocks are numbered `[unit, chunk, part]`.
struct Chunk {
    Place r;
    int part, first, end, last;
    i64 matrix;
    __device__ __forceinline__ int count() const { return end - first; }
};
__device__ __forceinline__ Chunk chunk_of(const Piece &p, const u32 *lengths, int parts) {
    Chunk x;
    u32 at = blockIdx.x / parts;
    int chunk = at % p.chunks;
    x.part = blockIdx.x % parts;
    x.r.b = at / p.chunks / p.heads;
    x.r.head = at / p.chunks % p.heads;
    x.r.token = x.first = chunk * CHUNK;
    x.r.in_group = 0;
    x.last = x.first + CHUNK < (int)p.tokens ? x.first + CHUNK : (int)p.tokens;
    x.end = (int)lengths[x.r.b] < x.last ? (int)lengths[x.r.b] : x.last;
    if (x.end < x.first) x.end = x.first;
    x.matrix = matrix_at(p, x.r);
    return x;
}
// Of the chunk's `i`-th token: its row among those of keys, or of queries.
__device__ __forceinline__ u32 row_of(const Piece &p, const Chunk &x, int i, int per_head) {
    return (((u32)x.r.b * p.tokens + x.first + i) * p.heads + x.r.head) * per_head + x.r.in_group;
}

// Sum over a warp.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
    for (int step = 16; step > 0; step >>= 1) x += from_lane(x, step);
    return x;
}

// Per row of queries: factor of the weighted sum, weight of the last row, weight of the mean, Σ Ψ·(mass column).
#define STATISTICS 4
