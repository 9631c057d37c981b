// The last tokens of a state: a step keeps its token's hash and value beside the sums, which it then only reads, and every
// PENDING-th step adds them all to the sums. Of each (sequence, kv head) there is a record of floats: how many wait, and
// how many blocks of a step have come, both integers; then of each token 2βt of all bits, and v.
#pragma once
#include "../state.cuh"
#include "any.cuh"

// Channels of v that a block takes: 32, 64 or 128. Of each it has several threads, which share the buckets.
#ifndef CHANNELS
#define CHANNELS 32
#endif
constexpr int STRANDS = BLOCK / CHANNELS;
// The Rust twin is `pending` in src/race/cuda/state.rs.
constexpr int PENDING = BITS <= 64 ? 16 : BITS <= 128 ? 8 : BITS <= 256 ? 4 : 1;
constexpr int CHANNEL_BLOCKS = (VALUE_DIM + CHANNELS - 1) / CHANNELS;
constexpr int TOKEN = ENSEMBLES * BITS + VALUE_DIM;
constexpr int HEADER = 2;
constexpr int RECORD = HEADER + PENDING * TOKEN;

// The odds of one bit, (σ(−z), σ(z)), each to its own relative precision.
__device__ __forceinline__ float2 odds_of(float z) {
    float e = expf(-fabsf(z)), large = quotient(1.0f, 1.0f + e), small = e * large;
    float2 pair = {z > 0.0f ? small : large, z > 0.0f ? large : small};
    return pair;
}

__device__ __forceinline__ float phi_of(const float2 *odds, int bucket) {
    float weight = 1.0f;
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++) {
        float2 pair = odds[bucket / RADIX * PLANES + plane];
        weight *= (bucket >> (PLANES - 1 - plane)) & 1 ? pair.y : pair.x;
    }
    return weight;
}

__device__ __forceinline__ const float *waiting(const float *record, int token) { return record + HEADER + token * TOKEN; }

// Adds `count` tokens, whose odds are given, to B of one ensemble in the block's channels; `values` are those of the
// thread's channel.
__device__ __forceinline__ void fold_values(float *of_ensemble, const float2 *odds, const float (&values)[PENDING], int count, int channel) {
    int lane = threadIdx.x & 31;
    for (int s = threadIdx.x / CHANNELS; s < BUCKETS; s += STRANDS) {
        float phi = lane < count ? phi_of(odds + lane * BITS, s) : 0.0f, sum = 0.0f;
#pragma unroll
        for (int i = 0; i < PENDING; i++) sum += of_lane(phi, i) * values[i];
        if (channel < VALUE_DIM) set_sum(of_ensemble, s * COLUMNS + channel, sum_at(of_ensemble, s * COLUMNS + channel) + sum);
    }
}
// The same of A.
__device__ __forceinline__ void fold_masses(float *of_ensemble, const float2 *odds, int count) {
    for (int s = threadIdx.x; s < BUCKETS; s += BLOCK) {
        float sum = 0.0f;
        for (int i = 0; i < count; i++) sum += phi_of(odds + i * BITS, s);
        set_sum(of_ensemble, s * COLUMNS + VALUE_DIM, sum_at(of_ensemble, s * COLUMNS + VALUE_DIM) + sum);
    }
}
