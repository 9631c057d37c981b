// What the kernels of the exact window share. Positions are counted from a call's first token: those before it are in the
// ring, `[sequence, slot, kv head, RING_ROW]`, k's channels first. Strides are in elements, results contiguous.
#pragma once
#include "machine.cuh"
#include "common/numbers.cuh"

#define NEAR 16

// The Rust twin is `Params` in src/race/cuda/window_kernels.rs.
struct Params {
    i64 q_batch, q_token, q_head;
    i64 k_batch, k_token, k_head;
    i64 v_batch, v_token, v_head;
    i64 g_batch, g_token, g_head;
    // Tokens that the tensors have room for; tiles of a sequence, or shares of the gates' gradients.
    u32 batch, tokens, window, tiles;
    // Tiles of keys before the call; gates.
    u32 ring_tiles, gates;
    float scale;
    u32 reserved;
    // Tokens of the sequences where there are few; else they come in memory.
    u32 near[NEAR];
};
static_assert(sizeof(Params) == PARAMS_BYTES, "the Rust twin differs");

constexpr int RING_ROW = (HEAD_DIM + VALUE_DIM + 1) / 2 * 2;
constexpr int Q_HEADS = KV_HEADS * GROUP;
constexpr float WINDOW_LOG2_E = 1.4426950408889634f;
// Finite: no real logit comes near.
constexpr float MASKED = -1.0e30f;

// Where a sequence stands.
struct Sequence {
    // Tokens of the call; tokens before it that the window reaches; the slot of the call's first token.
    u32 length, past, slot;
};
// `seen` counts the tokens that a ring has taken in, `[sequence, kv head]`: on the device, so that a replayed graph goes on.
__device__ __forceinline__ Sequence sequence_of(const Params &p, const u32 *far, const u64 *seen, int b) {
    u64 before = seen[(i64)b * KV_HEADS];
    u32 slot = before >> 32 ? (u32)(before % p.window) : (u32)before % p.window;
    return {far ? far[b] : p.near[b], before < p.window ? (u32)before : p.window - 1, slot};
}

// The element where the row of a position begins in a ring.
__device__ __forceinline__ i64 ring_row(const Params &p, const Sequence &s, int b, int position, int head) {
    u32 slot = position < 0 ? s.slot + p.window - (u32)-position : (s.slot + (u32)position % p.window);
    if (slot >= p.window) slot -= p.window;
    return (((i64)b * p.window + slot) * KV_HEADS + head) * RING_ROW;
}

// A row of elements of IN_TYPE.
struct Row {
    const void *from;
    i64 at;
};
__device__ __forceinline__ Row key_row(const Params &p, const Sequence &s, const void *k, const void *ring, int b, int position, int head) {
    if (position < 0) return {ring, ring_row(p, s, b, position, head)};
    return {k, b * p.k_batch + position * p.k_token + head * p.k_head};
}
__device__ __forceinline__ Row value_row(const Params &p, const Sequence &s, const void *v, const void *ring, int b, int position, int head) {
    if (position < 0) return {ring, ring_row(p, s, b, position, head) + HEAD_DIM};
    return {v, b * p.v_batch + position * p.v_token + head * p.v_head};
}

__device__ __forceinline__ bool sees(const Params &p, const Sequence &s, int token, int position) {
    return position <= token && position > token - (int)p.window && position >= -(int)s.past;
}

// Query rows of a block, of one kv head: a row is a (token, head of the group) pair, tokens first.
struct Rows {
    int b, head, first;
    // The first and the last token of those that there are; none where the last is before the first.
    int first_token, last_token;
};
template <int COUNT> __device__ __forceinline__ Rows rows_of(const Params &p) {
    Rows r;
    r.head = blockIdx.x % KV_HEADS;
    r.first = (int)(blockIdx.x / KV_HEADS % p.tiles) * COUNT;
    r.b = blockIdx.x / KV_HEADS / p.tiles;
    r.first_token = r.first / GROUP;
    return r;
}
template <int COUNT> __device__ __forceinline__ void end_rows(Rows &r, int length) {
    int last = (r.first + COUNT - 1) / GROUP;
    r.last_token = r.first_token >= length ? -(1 << 30) : last < length ? last : length - 1;
}
__device__ __forceinline__ int token_of(const Rows &r, int row) { return (r.first + row) / GROUP; }
__device__ __forceinline__ int head_of(const Rows &r, int row) { return r.head * GROUP + (r.first + row) % GROUP; }
// The first position that any of the rows sees.
__device__ __forceinline__ int first_key(const Params &p, const Sequence &s, const Rows &r) {
    int first = r.first_token + 1 - (int)p.window;
    return first > -(int)s.past ? first : -(int)s.past;
}
// A query head's row of a contiguous tensor.
__device__ __forceinline__ i64 query_at(const Params &p, int b, int token, int head) { return ((i64)b * p.tokens + token) * Q_HEADS + head; }

__device__ __forceinline__ float warp_max(float x) {
    for (int step = 16; step > 0; step >>= 1) {
        float y = from_lane(x, step);
        x = x > y ? x : y;
    }
    return x;
}
__device__ __forceinline__ float warp_sum(float x) {
    for (int step = 16; step > 0; step >>= 1) x += from_lane(x, step);
    return x;
}
