// What every kernel is given, by value; the Rust twins are in src/socket/cuda/params.rs.
#pragma once
#include "ptx.cuh"

struct Strides {
    i64 batch, token, head;
};

// One query token of one sequence.
struct Row {
    u32 visible, heavy;
    // The sequence's place in the state.
    u32 slot;
    // 1 where the keys are not hashed yet.
    u32 unindexed;
    // First score, in units of 64.
    u32 score_base;
    u32 part_base, part_count;
    // The sequence's place in the table of pages.
    u32 sequence;
};

// Tokens of one sequence to store and hash.
struct Item {
    u32 batch_row, start, count, slot;
    u32 hash_start, hash_end, sequence, reserved;
};

#define NEAR_ROWS 16
#define NEAR_ITEMS 16

struct Params {
    const void* q;
    const void* k;
    const void* v;
    void* o;
    float* lse;
    // Addresses of pages, `[sequence, pages_stride]`.
    const u64* pages;
    // Rows and items; where null, those in the struct itself.
    const Row* rows;
    const Item* items;
    // `[sets, head_dim, bits]`.
    const float* planes;
    // Per slot: means `[kv head, head_dim]`, largest gains `[kv head]`.
    u32* state;
    float* tables;
    u16* scores;
    u32* histogram;
    u32* candidates;
    // Per score row: bins above it are selected.
    u32* cuts;
    float* partials;
    // Zero between kernels.
    u32* arrivals;
    u32* non_finite;
    int* indices;
    float* values;
    Strides q_strides, k_strides, v_strides;
    u32 pages_stride, planes_stride;
    u32 tq, first_row;
    u32 sink, window;
    float scale, beta;
    // Tokens per block.
    u32 span;
    // Entries of a selection row.
    u32 width;
    u32 items_count, max_count;
    Row near_rows[NEAR_ROWS];
    Item near_items[NEAR_ITEMS];
};

__device__ __forceinline__ Row row_at(const Params& p, u32 index) {
    return p.rows ? p.rows[index] : p.near_rows[index];
}
__device__ __forceinline__ Item item_at(const Params& p, u32 index) {
    return p.items ? p.items[index] : p.near_items[index];
}

// A page: keys `[kv head, token, piece of 16 bytes]`, values likewise, index `[kv head, word, token]`.
#define PIECE (KV_DTYPE == DTYPE_F32 ? 4 : 8)
#define K_PIECES ((HEAD_DIM + PIECE - 1) / PIECE)
#define V_PIECES ((VALUE_DIM + PIECE - 1) / PIECE)
#define V_OFFSET ((u64)KV_HEADS * PAGE * K_PIECES * 16)
#define INDEX_OFFSET (V_OFFSET + (u64)KV_HEADS * PAGE * V_PIECES * 16)

__device__ __forceinline__ u64 page_of(const Params& p, u32 sequence, u32 token) {
    return __ldg(&p.pages[(u64)sequence * p.pages_stride + token / PAGE]);
}
__device__ __forceinline__ u64 key_row(u64 page, u32 head, u32 token) {
    return page + ((u64)head * PAGE + token % PAGE) * (K_PIECES * 16);
}
__device__ __forceinline__ u64 value_row(u64 page, u32 head, u32 token) {
    return page + V_OFFSET + ((u64)head * PAGE + token % PAGE) * (V_PIECES * 16);
}
// Word `word` of the index at a token; neighbouring tokens are neighbours.
__device__ __forceinline__ u32* index_word(u64 page, u32 head, u32 word, u32 token) {
    return (u32*)(page + INDEX_OFFSET) + ((u64)head * INDEX_WORDS + word) * PAGE + token % PAGE;
}
__device__ __forceinline__ float stored(u64 row, u32 channel) {
    return widen<KV_DTYPE>(((const Element<KV_DTYPE>::stored*)row)[channel]);
}
__device__ __forceinline__ bool in_base(const Params& p, const Row& row, u32 token) {
    return token < p.sink || token + p.window >= row.visible;
}
#define PART_STRIDE (4 + V_PIECES * PIECE)
