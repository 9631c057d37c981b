// Partial results of attention over a part of the keys, and their merge: peak of the logits in units of log 2, sum,
// then the values, unscaled.
#pragma once
#include "params.cuh"

// Finite: no real logit comes near.
#define MASKED -1.0e30f

__device__ __forceinline__ void store_lse(const Call& p, u64 index, float peak, float sum) {
    p.lse[index] = sum > 0.0f ? (peak + log2f(sum)) * LN_2 : bits_float(0xff800000u);
}

// Merges the parts of `heads` query heads from `first_head` on, in their order; by a whole block, one warp per head,
// whose lanes share the channels. All that a lane reads of some parts is under way at once.
template <int THREADS> __device__ void merge_parts(const Call& p, const Row& row, u32 row_index, u32 first_head, u32 heads) {
    const u32 vectors = (VALUE_DIM + 3) / 4, own = (vectors + 31) / 32;
    // As small blocks have registers.
    const u32 together = THREADS > 128 || own > 4 ? 8 : 32 / own;
    u32 lane = threadIdx.x & 31;
    for (u32 h = threadIdx.x >> 5; h < heads; h += THREADS / 32) {
        u32 head = first_head + h;
        const float* parts = p.partials + ((u64)row.part_base + (u64)head * row.part_count) * PART_STRIDE;
        float4 values[own];
#pragma unroll
        for (u32 i = 0; i < own; i++) values[i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
        float top = MASKED, sum = 0.0f;
        for (u32 base = 0; base < row.part_count; base += together) {
            u32 count = min_u32(together, row.part_count - base);
            float2 state = {MASKED, 0.0f};
            if (lane < count) state = *(const float2*)&parts[(u64)(base + lane) * PART_STRIDE];
            float4 loaded[together][own];
#pragma unroll
            for (u32 j = 0; j < together; j++)
#pragma unroll
                for (u32 i = 0; i < own; i++) {
                    u32 vector = i * 32 + lane;
                    loaded[j][i] = float4{0.0f, 0.0f, 0.0f, 0.0f};
                    if (j < count && (vectors % 32 == 0 || vector < vectors))
                        loaded[j][i] = *(const float4*)&parts[(u64)(base + j) * PART_STRIDE + 4 + vector * 4];
                }
            float most = state.x;
            for (u32 step = 16; step > 0; step >>= 1) most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, step));
            most = fmaxf(top, most);
            float keep = exp2_fast(top - most), weight = state.y > 0.0f ? exp2_fast(state.x - most) : 0.0f;
            top = most;
            sum = sum * keep + state.y * weight;
#pragma unroll
            for (u32 i = 0; i < own; i++) values[i] = {values[i].x * keep, values[i].y * keep, values[i].z * keep, values[i].w * keep};
#pragma unroll
            for (u32 j = 0; j < together; j++) {
                float of_part = __shfl_sync(FULL_WARP, weight, j);
#pragma unroll
                for (u32 i = 0; i < own; i++) {
                    values[i].x += of_part * loaded[j][i].x;
                    values[i].y += of_part * loaded[j][i].y;
                    values[i].z += of_part * loaded[j][i].z;
                    values[i].w += of_part * loaded[j][i].w;
                }
            }
        }
        sum = warp_sum(sum);
        float inverse = sum > 0.0f ? divide(1.0f, sum) : 0.0f;
        u64 index = (u64)row_index * Q_HEADS + head;
#pragma unroll
        for (u32 i = 0; i < own; i++) {
            float x[4] = {values[i].x, values[i].y, values[i].z, values[i].w};
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                u32 channel = (i * 32 + lane) * 4 + c;
                if (channel < VALUE_DIM) store_element<OUT_DTYPE>(p.o, index * VALUE_DIM + channel, x[c] * inverse);
            }
        }
        if (lane == 0) store_lse(p, index, top, sum);
    }
}
