// Sign bits and scalars of a few new keys: one block per (token, kv head, item), one plane per thread.
#include "scoring.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)

// Sum over the block, in a fixed order; by all threads.
__device__ float block_sum(float x) {
    __shared__ float sums[WARPS];
    x = warp_sum(x);
    __syncthreads();
    if ((threadIdx.x & 31) == 0) sums[threadIdx.x >> 5] = x;
    __syncthreads();
    float total = 0.0f;
    for (u32 w = 0; w < WARPS; w++) total += sums[w];
    return total;
}

extern "C" __global__ void __launch_bounds__(THREADS) hash_step(ARGUMENTS) {
    CALL;
    __shared__ float key[HEAD_DIM];
    __shared__ u32 words[WORDS];
    Item item = p.items[blockIdx.z];
    u32 head = blockIdx.y, token = item.hash_start + blockIdx.x;
    wait_for_earlier();
    if (token >= item.hash_end) return;
    u64 page = page_of(p, item.sequence, token);
    u64 row = key_row(page, head, token);
    const float* planes = p.planes + (p.planes_stride > 0 ? (u64)head * p.planes_stride : 0);
    float key_square = 0.0f;
    for (u32 c = threadIdx.x; c < HEAD_DIM; c += THREADS) {
        float x = stored(row, c);
#if CENTER
        x -= bits_float(p.state[(u64)item.slot * SLOT_WORDS + head * HEAD_DIM + c]);
#endif
        key[c] = x;
        key_square += x * x;
    }
    for (u32 i = threadIdx.x; i < WORDS; i += THREADS) words[i] = 0;
    __syncthreads();
    float projection_sum = 0.0f;
    for (u32 plane = threadIdx.x; plane < BITS; plane += THREADS) {
        float u = 0.0f;
#pragma unroll 16
        for (u32 c = 0; c < HEAD_DIM; c++) u += key[c] * __ldg(&planes[(u64)c * BITS + plane]);
        projection_sum += fabsf(u);
        u32 table = plane / PLANES;
        u32 bit = table % TABLES_PER_WORD * PLANES + PLANES - 1 - plane % PLANES;
        if (u >= 0.0f) atomicOr(&words[table / TABLES_PER_WORD], 1u << bit);
    }
    __syncthreads();
    for (u32 i = threadIdx.x; i < WORDS; i += THREADS) *index_word(page, head, i, token) = words[i];
#if GAIN
    float square = 0.0f;
#if VALUE_NORM
    u64 value = value_row(page, head, token);
    for (u32 c = threadIdx.x; c < VALUE_DIM; c += THREADS) {
        float x = stored(value, c);
        square += x * x;
    }
#endif
    float value_norm = sqrtf(block_sum(square));
    float key_total = block_sum(key_square);
    float projections = block_sum(projection_sum);
    if (threadIdx.x == 0) {
        float gain = key_gain(value_norm, key_total, projections);
        *index_word(page, head, WORDS, token) = float_bits(gain);
        // Gains are never negative, so their bits have their order.
        atomicMax(&p.state[(u64)item.slot * SLOT_WORDS + MEAN_WORDS + head], float_bits(gain));
#if BIAS
        *index_word(page, head, WORDS + 1, token) = float_bits(key_bias(value_norm));
#endif
    }
#endif
}
