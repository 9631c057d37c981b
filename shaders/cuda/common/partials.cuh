// Partial results of attention over a part of the keys, and their merge: peak of the logits in units of log 2, sum,
// then the values, unscaled.
#pragma once
#include "params.cuh"

// Finite: no real logit comes near.
#define MASKED -1.0e30f

__device__ __forceinline__ void store_lse(const Call& p, u64 index, float peak, float sum) {
    p.lse[index] = sum > 0.0f ? (peak + log2f(sum)) * LN_2 : bits_float(0xff800000u);
}

// Merges the parts of `heads` query heads from `first_head` on, in their order; by a whole block of THREADS.
template <int THREADS> __device__ void merge_parts(const Call& p, const Row& row, u32 row_index, u32 first_head, u32 heads) {
    for (u32 i = threadIdx.x; i < heads * VALUE_DIM; i += THREADS) {
        u32 head = first_head + i / VALUE_DIM, channel = i % VALUE_DIM;
        const float* parts = p.partials + ((u64)row.part_base + (u64)head * row.part_count) * PART_STRIDE;
        float top = MASKED;
        for (u32 part = 0; part < row.part_count; part++) top = fmaxf(top, parts[part * PART_STRIDE]);
        float sum = 0.0f, value = 0.0f;
#pragma unroll 8
        for (u32 part = 0; part < row.part_count; part++) {
            const float* at = parts + part * PART_STRIDE;
            float weight = at[1] > 0.0f ? exp2_fast(at[0] - top) : 0.0f;
            sum += at[1] * weight;
            value += at[4 + channel] * weight;
        }
        u64 index = (u64)row_index * Q_HEADS + head;
        store_element<OUT_DTYPE>(p.o, index * VALUE_DIM + channel, sum > 0.0f ? divide(value, sum) : 0.0f);
        if (channel == 0) store_lse(p, index, top, sum);
    }
}
