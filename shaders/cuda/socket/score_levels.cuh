// What the ways to score keys share: a block stores its keys' levels, and counts them in shared memory.
#pragma once
#include "scoring.cuh"

// Registers set how many there are.
#if FAST == 2
#define SCORERS 256
#define BLOCKS_TOGETHER 3
#else
#define SCORERS 512
#define BLOCKS_TOGETHER 2
#endif
// With one warp that has keys copied.
#define THREADS (SCORERS + (BULK ? 32 : 0))

extern __shared__ __align__(256) u32 memory[];

// Brings the index of a key nearer.
__device__ __forceinline__ void prefetch_key(const u32* index) {
#pragma unroll
    for (u32 w = 0; w < INDEX_WORDS; w++) asm volatile("prefetch.global.L2 [%0];" ::"l"(index + w * PAGE));
}

// Counts a level, and stores it.
__device__ __forceinline__ void put(u32 level, u32 place, bool contested, u16* scores, u32* counts) {
    scores[place] = (u16)level;
    if (contested) atomicAdd(&counts[level >> BIN_SHIFT], 1u);
}

// Waits for the query's tables.
__device__ __forceinline__ void begin() {
    wait_for_earlier();
    let_later_start();
}

__device__ __forceinline__ bool is_contested(const Call& p, const Row& row, u32 token) {
#if DISJOINT
    return !in_base(p, row, token);
#else
    return true;
#endif
}

// Adds what a block counted to the row's histogram.
__device__ __forceinline__ void flush(const Call& p, u64 score_row, const u32* counts, u32 heads) {
    for (u32 i = threadIdx.x; i < heads * BINS; i += THREADS) {
        u32 count = counts[i];
        if (count > 0) atomicAdd(&p.histogram[(score_row + i / BINS) * (BINS + 1) + i % BINS], count);
    }
}
