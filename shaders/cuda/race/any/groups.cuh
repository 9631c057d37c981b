// Chunks of a unit in groups of GROUP_CHUNKS: many chunks are scanned by their groups' totals.
#pragma once
#include "any.cuh"

// The Rust twins are in src/race/cuda/any.rs and src/race/cuda/params.rs.
#define GROUP_CHUNKS 16
struct Groups {
    u32 units, chunks, groups, reserved;
};

// Element `at` of all groups: where its group's first chunk has it, and how many chunks there are.
__device__ __forceinline__ i64 first_of(const Groups &p, i64 at, int &count) {
    i64 group = at / MATRIX;
    int first = group % p.groups * GROUP_CHUNKS;
    count = (int)p.chunks - first < GROUP_CHUNKS ? (int)p.chunks - first : GROUP_CHUNKS;
    return (group / p.groups * p.chunks + first) * MATRIX + at % MATRIX;
}
