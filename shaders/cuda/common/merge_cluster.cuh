// The end of attention whose spans are the blocks of a cluster: their results are merged where they are, in shared memory.
#pragma once
#include "cluster.cuh"
#include "tiles.cuh"

#if __CUDA_ARCH__ >= 900
// Merges the warps' results, then the blocks', each block some channels; `results` has room for WARPS * RESULT floats and
// HEADS * PART_STRIDE more. By all threads of all blocks of the cluster.
__device__ __forceinline__ void merge_cluster(Tiles& work, u32 row_index, u32 kv_head, u32 rank, float* results) {
    const Call& p = *work.w.p;
    float* merged = results + WARPS * RESULT;
    __syncthreads();
    work.store(results);
    __syncthreads();
    for (u32 i = threadIdx.x; i < HEADS * VALUE_DIM; i += THREADS) {
        u32 head = i / VALUE_DIM, channel = i % VALUE_DIM;
        float top, total, value;
        merge_warps(results, head, channel, top, total, value);
        merged[head * PART_STRIDE + 4 + channel] = value;
        if (channel == 0) {
            merged[head * PART_STRIDE] = top;
            merged[head * PART_STRIDE + 1] = total;
        }
    }
    cluster_barrier();
    const u32 share = (HEADS * VALUE_DIM + CLUSTER - 1) / CLUSTER;
    for (u32 i = rank * share + threadIdx.x; i < min_u32((rank + 1) * share, HEADS * VALUE_DIM); i += THREADS) {
        u32 head = i / VALUE_DIM, channel = i % VALUE_DIM;
        float tops[CLUSTER], totals[CLUSTER], values[CLUSTER], top = MASKED, total = 0.0f, value = 0.0f;
#pragma unroll
        for (u32 r = 0; r < CLUSTER; r++) {
            uint2 state = remote_uint2(&merged[head * PART_STRIDE], r);
            tops[r] = bits_float(state.x);
            totals[r] = bits_float(state.y);
            values[r] = remote_float(&merged[head * PART_STRIDE + 4 + channel], r);
        }
#pragma unroll
        for (u32 r = 0; r < CLUSTER; r++) top = fmaxf(top, tops[r]);
#pragma unroll
        for (u32 r = 0; r < CLUSTER; r++) {
            float weight = totals[r] > 0.0f ? exp2_fast(tops[r] - top) : 0.0f;
            total += totals[r] * weight;
            value += values[r] * weight;
        }
        u64 index = (u64)row_index * Q_HEADS + kv_head * GROUP + head;
        store_element<OUT_DTYPE>(p.o, index * VALUE_DIM + channel, total > 0.0f ? divide(value, total) : 0.0f);
        if (channel == 0) store_lse(p, index, top, total);
    }
    // A block's shared memory is there until all have read it.
    cluster_barrier();
}
#endif
