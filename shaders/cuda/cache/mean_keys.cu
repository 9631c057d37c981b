// The mean of the first `max_count` keys of a sequence, per channel: one block per (channel, kv head, item). Sums keep
// their rest, so that a long one keeps its low bits.
#include "params.cuh"

#define THREADS 256

extern "C" __global__ void __launch_bounds__(THREADS) mean_keys(ARGUMENTS) {
    CALL;
    __shared__ float sums[THREADS];
    Item item = p.items[blockIdx.z];
    u32 channel = blockIdx.x, head = blockIdx.y;
    wait_for_earlier();
    float sum = 0.0f, rest = 0.0f;
    for (u32 token = threadIdx.x; token < p.max_count; token += THREADS) {
        float x = stored(key_row(page_of(p, item.sequence, token), head, token), channel);
        float total = sum + x;
        rest += fabsf(sum) >= fabsf(x) ? (sum - total) + x : (x - total) + sum;
        sum = total;
    }
    sums[threadIdx.x] = sum + rest;
    for (u32 step = THREADS / 2; step > 0; step >>= 1) {
        __syncthreads();
        if (threadIdx.x < step) sums[threadIdx.x] += sums[threadIdx.x + step];
    }
    if (threadIdx.x == 0)
        p.state[(u64)item.slot * KV_HEADS * (HEAD_DIM + 1) + head * HEAD_DIM + channel] = float_bits(sums[0] / (float)p.max_count);
}
