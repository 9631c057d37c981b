// Partial results of attention over a part of the keys, and their merge: peak of the logits in units of log 2, sum,
// then the values, unscaled.
#pragma once
#include "params.cuh"

// What rounding x to 16 bits leaves.
__device__ __forceinline__ float rest_of(float x) { return x - widen<KV_DTYPE>(narrow<KV_DTYPE>(x)); }

// Adds the products of 16 weights, in several parts, with 16 rows of values to two tiles of sums. The matrix unit cuts off
// what it adds up, always towards zero, which bends a long sum: APART it adds up these 16 alone.
template <bool APART, u32 PARTS>
__device__ __forceinline__ void add_values(float (*values)[4], const u32 (&weights)[PARTS][4], const u32 (&rows)[4]) {
    float sums[2][4];
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) sums[i][c] = APART ? 0.0f : values[i][c];
#pragma unroll
    for (u32 part = 0; part < PARTS; part++) {
        mma16<KV_DTYPE>(sums[0], weights[part], rows[0], rows[1]);
        mma16<KV_DTYPE>(sums[1], weights[part], rows[2], rows[3]);
    }
#pragma unroll
    for (u32 i = 0; i < 2; i++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) values[i][c] = APART ? values[i][c] + sums[i][c] : sums[i][c];
}

// Raises the peaks of a lane's rows to `top`: what was added before counts less by as much. Of two rows the second has the
// last two of each four values.
template <u32 ROWS, u32 TILES>
__device__ __forceinline__ void raise_peaks(float (&peak)[ROWS], float (&sum)[ROWS], float (&values)[TILES][4], const float (&top)[ROWS]) {
    float keep[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        keep[r] = exp2_fast(peak[r] - top[r]);
        sum[r] *= keep[r];
        peak[r] = top[r];
    }
#pragma unroll
    for (u32 i = 0; i < TILES; i++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) values[i][c] *= keep[ROWS == 1 ? 0 : c / 2];
}

// Finite: no real logit comes near.
#define MASKED -1.0e30f

__device__ __forceinline__ void store_lse(const Call& p, u64 index, float peak, float sum) {
    p.lse[index] = sum > 0.0f ? (peak + log2f(sum)) * LN_2 : bits_float(0xff800000u);
}

// What a warp knows of a head: each lane has every 32nd vector of four channels.
struct Merged {
    float top, sum;
    float4 values[((VALUE_DIM + 3) / 4 + 31) / 32];
};

// The merge of `count` parts of a head that lie `stride` floats apart, in their order, by a warp. All that a lane reads of
// TOGETHER parts is under way at once.
template <u32 TOGETHER> __device__ __forceinline__ Merged merge_of(const float* parts, u32 stride, u32 count) {
    const u32 vectors = (VALUE_DIM + 3) / 4, own = (vectors + 31) / 32;
    u32 lane = threadIdx.x & 31;
    Merged merged;
#pragma unroll
    for (u32 i = 0; i < own; i++) merged.values[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
    float top = MASKED, sum = 0.0f;
    for (u32 base = 0; base < count; base += TOGETHER) {
        u32 left = min_u32(TOGETHER, count - base);
        float2 state = {MASKED, 0.0f};
        if (lane < left) state = *(const float2*)&parts[(u64)(base + lane) * stride];
        float4 loaded[TOGETHER][own];
#pragma unroll
        for (u32 j = 0; j < TOGETHER; j++)
#pragma unroll
            for (u32 i = 0; i < own; i++) {
                u32 vector = i * 32 + lane;
                loaded[j][i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
                if (j < left && (vectors % 32 == 0 || vector < vectors))
                    loaded[j][i] = *(const float4*)&parts[(u64)(base + j) * stride + 4 + vector * 4];
            }
        float most = state.x;
        for (u32 step = 16; step > 0; step >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, step));
        most = fmaxf(top, most);
        float keep = exp2_fast(top - most), weight = state.y > 0.0f ? exp2_fast(state.x - most) : 0.0f;
        top = most;
        sum = sum * keep + state.y * weight;
#pragma unroll
        for (u32 i = 0; i < own; i++) {
            float4& x = merged.values[i];
            x = float4{x.x * keep, x.y * keep, x.z * keep, x.w * keep};
        }
#pragma unroll
        for (u32 j = 0; j < TOGETHER; j++) {
            float of_part = __shfl_sync(FULL_WARP, weight, j);
#pragma unroll
            for (u32 i = 0; i < own; i++) {
                merged.values[i].x += of_part * loaded[j][i].x;
                merged.values[i].y += of_part * loaded[j][i].y;
                merged.values[i].z += of_part * loaded[j][i].z;
                merged.values[i].w += of_part * loaded[j][i].w;
            }
        }
    }
    merged.top = top;
    merged.sum = warp_sum(sum);
    return merged;
}

// Writes what a head comes to, by a warp.
__device__ __forceinline__ void store_merged(const Call& p, u64 index, const Merged& merged) {
    const u32 own = ((VALUE_DIM + 3) / 4 + 31) / 32;
    u32 lane = threadIdx.x & 31;
    float inverse = merged.sum > 0.0f ? divide(1.0f, merged.sum) : 0.0f;
#pragma unroll
    for (u32 i = 0; i < own; i++) {
        float x[4] = {merged.values[i].x, merged.values[i].y, merged.values[i].z, merged.values[i].w};
#pragma unroll
        for (u32 c = 0; c < 4; c++) {
            u32 channel = (i * 32 + lane) * 4 + c;
            if (channel < VALUE_DIM) store_element<OUT_DTYPE>(p.o, index * VALUE_DIM + channel, x[c] * inverse);
        }
    }
    if (lane == 0) store_lse(p, index, merged.top, merged.sum);
}

// Writes it as a part of a larger merge, by a warp.
__device__ __forceinline__ void store_part(float* part, const Merged& merged) {
    const u32 vectors = (VALUE_DIM + 3) / 4, own = (vectors + 31) / 32;
    u32 lane = threadIdx.x & 31;
#pragma unroll
    for (u32 i = 0; i < own; i++) {
        u32 vector = i * 32 + lane;
        if (vectors % 32 == 0 || vector < vectors) *(float4*)&part[4 + vector * 4] = merged.values[i];
    }
    if (lane == 0) *(float2*)part = float2{merged.top, merged.sum};
}

// Merges the parts of `heads` query heads from `first_head` on; by a whole block, one warp per head.
template <u32 THREADS, u32 TOGETHER>
__device__ void merge_parts(const Call& p, const Row& row, u32 row_index, u32 first_head, u32 heads) {
    for (u32 h = threadIdx.x >> 5; h < heads; h += THREADS / 32) {
        u32 head = first_head + h;
        const float* parts = p.partials + ((u64)row.part_base + (u64)head * row.part_count) * PART_STRIDE;
        store_merged(p, (u64)row_index * Q_HEADS + head, merge_of<TOGETHER>(parts, PART_STRIDE, row.part_count));
    }
}
