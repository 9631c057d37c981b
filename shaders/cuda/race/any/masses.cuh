// Masses that the queries of a chunk find in 64 buckets, those of the sums before it and, but for READ, of the chunk's
// keys up to their own.
#pragma once
#include "any.cuh"

constexpr int SLICE_BUCKETS = 64;
constexpr int SEGMENT = CHUNK / (BLOCK / SLICE_BUCKETS);

struct Masses {
    float of[CHUNK][SLICE_BUCKETS + 1];
    float entries[SLICE_BUCKETS];
};

// Of buckets from `bucket` on, by the whole block; buckets that there are not have none.
__device__ __forceinline__ void find_masses(Masses &masses, const Piece &p, const Chunk &at, const float *keys, const float *matrix, int bucket) {
    int s = threadIdx.x % SLICE_BUCKETS, segment = threadIdx.x / SLICE_BUCKETS;
    bool real = bucket + s < BUCKETS;
    float entry = real ? matrix[(bucket + s) * COLUMNS + VALUE_DIM] : 0.0f, sums[SEGMENT];
#ifndef READ
    Chunk of_keys = at;
    of_keys.r.in_group = 0;
#endif
#pragma unroll
    for (int i = 0; i < SEGMENT; i++) {
        sums[i] = 0.0f;
#ifndef READ
        int token = segment * SEGMENT + i;
        if (real && token < at.count()) sums[i] = keys[(i64)row_of(p, of_keys, token, 1) * BUCKETS + bucket + s];
#endif
    }
#ifndef READ
#pragma unroll
    for (int i = 1; i < SEGMENT; i++) sums[i] += sums[i - 1];
#endif
    barrier();
    if (segment == 0) masses.entries[s] = entry;
#ifndef READ
    masses.of[segment][s] = sums[SEGMENT - 1];
    barrier();
    float before = entry;
    for (int i = 0; i < segment; i++) before += masses.of[i][s];
    barrier();
#else
    float before = entry;
#endif
#pragma unroll
    for (int i = 0; i < SEGMENT; i++) masses.of[segment * SEGMENT + i][s] = before + sums[i];
    barrier();
}

// Rows of a warp.
constexpr int OWN_QUERIES = CHUNK / (BLOCK / 32);
