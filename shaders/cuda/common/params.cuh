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

#define NEAR 16

// Sizes and numbers of a call.
struct Numbers {
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
};

struct Params {
    Numbers numbers;
    // Rows and items where there are few; else they come in memory.
    Row rows[NEAR];
    Item items[NEAR];
};

// The numbers, and the memory of a call; a kernel uses what concerns it.
struct Call : Numbers {
    const void* q;
    const void* k;
    const void* v;
    void* o;
    float* lse;
    // Addresses of pages, `[sequence, pages_stride]`.
    const u64* pages;
    const Row* rows;
    const Item* items;
    // `[sets, head_dim, bits]`.
    const float* planes;
    // The same as three bf16 parts, `[sets, part, bits up to a multiple of 32, head_dim up to one of 16]`.
    const u16* plane_parts;
    // Per slot: means `[kv head, head_dim]`, largest gains `[kv head]`.
    u32* state;
    float* tables;
    u16* scores;
    u32* histogram;
    u32* candidates;
    // Per score row: levels from it on are selected.
    u32* cuts;
    float* partials;
    // Zero between kernels.
    u32* arrivals;
    u32* non_finite;
    int* indices;
    float* values;
};

// All kernels take the same arguments; `CALL` makes one thing of them.
#define ARGUMENTS \
    const __grid_constant__ Params params, const void *q_, const void *k_, const void *v_, void *o_, float \
    *lse_, const u64 *pages_, const Row *rows_, const Item *items_, const float *planes_, const u16 \
    *plane_parts_, u32 *state_, float *tables_, u16 *scores_, u32 *histogram_, u32 *candidates_, u32 *cuts_, \
    float *partials_, u32 *arrivals_, u32 *non_finite_, int *indices_, float *values_
#define CALL \
    const Call p = {params.numbers, q_, k_, v_, o_, lse_, pages_, rows_ ? rows_ : params.rows, items_ ? \
    items_ : params.items, planes_, plane_parts_, state_, tables_, scores_, histogram_, candidates_, cuts_, \
    partials_, arrivals_, non_finite_, indices_, values_}

// Row `index`. Those that travel in the arguments are not read by way of memory.
#define ROW_AT(index) (rows_ ? rows_[index] : params.rows[index])

// A page: keys `[kv head, token, piece of 16 bytes]`, values likewise, index `[kv head, word, token]`.
#define PIECE (KV_DTYPE == DTYPE_F32 ? 4 : 8)
#define K_PIECES ((HEAD_DIM + PIECE - 1) / PIECE)
#define V_PIECES ((VALUE_DIM + PIECE - 1) / PIECE)
#define V_OFFSET ((u64)KV_HEADS * PAGE * K_PIECES * 16)
#define INDEX_OFFSET (V_OFFSET + (u64)KV_HEADS * PAGE * V_PIECES * 16)

__device__ __forceinline__ u64 page_of(const Call& p, u32 sequence, u32 token) {
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
__device__ __forceinline__ bool in_base(const Call& p, const Row& row, u32 token) {
    return token < p.sink || token + p.window >= row.visible;
}
#define PART_STRIDE (4 + V_PIECES * PIECE)
