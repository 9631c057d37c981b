// How the blocks of a cluster share a row's tokens: in turns, a run each.
#pragma once
#include "ptx.cuh"

#define RUN 128

// The token of a place in a block, and the place of a token in its block.
__device__ __forceinline__ u32 token_of(u32 place, u32 rank) { return (place / RUN * CLUSTER + rank) * RUN + place % RUN; }
__device__ __forceinline__ u32 place_of(u32 token) { return token / (RUN * CLUSTER) * RUN + token % RUN; }

// How many of the first `visible` tokens are a block's.
__device__ __forceinline__ u32 tokens_of(u32 visible, u32 rank) {
    u32 rest = visible % (RUN * CLUSTER), before = rank * RUN;
    return visible / (RUN * CLUSTER) * RUN + (rest > before ? min_u32(rest - before, RUN) : 0);
}
