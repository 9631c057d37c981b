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

// Buckets that are added to at a time.
#define FOLD 64
// Adds `count` tokens, whose odds are given, to B of one ensemble in the block's channels, and to A if it is `with_masses`;
// `values` are those of the thread's channel. `phis` is room for the weights of FOLD buckets.
__device__ __forceinline__ void fold(float *of_ensemble, const float2 *odds, float *phis, const float (&values)[PENDING], int count, int channel, bool with_masses) {
    constexpr int EACH = 8;
    for (int base = 0; base < BUCKETS; base += FOLD) {
        barrier();
        for (int i = threadIdx.x; i < FOLD * PENDING; i += BLOCK) {
            int s = base + i / PENDING, token = i % PENDING;
            phis[i] = s < BUCKETS && token < count ? phi_of(odds + token * BITS, s) : 0.0f;
        }
        barrier();
        for (int first = threadIdx.x / CHANNELS; first < FOLD && base + first < BUCKETS; first += EACH * STRANDS) {
            float high[EACH], low[EACH];
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int s = first + i * STRANDS;
                const float *at = of_ensemble + (base + s) * COLUMNS + channel;
                bool there = s < FOLD && base + s < BUCKETS && channel < VALUE_DIM;
                high[i] = there ? at[0] : 0.0f;
                low[i] = there ? at[STATE_PLANE] : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < EACH; i++) {
                int s = first + i * STRANDS;
                if (s >= FOLD || base + s >= BUCKETS || channel >= VALUE_DIM) continue;
                float sum = 0.0f;
#pragma unroll
                for (int token = 0; token < PENDING; token++) sum += phis[s * PENDING + token] * values[token];
                add_to_pair(high[i], low[i], sum);
                float *at = of_ensemble + (base + s) * COLUMNS + channel;
                at[0] = high[i];
                at[STATE_PLANE] = low[i];
            }
        }
        int s = threadIdx.x;
        if (with_masses && s < FOLD && base + s < BUCKETS) {
            float sum = 0.0f, *at = of_ensemble + (base + s) * COLUMNS + VALUE_DIM;
            for (int token = 0; token < PENDING; token++) sum += phis[s * PENDING + token];
            add_to_pair(at[0], at[STATE_PLANE], sum);
        }
    }
}
