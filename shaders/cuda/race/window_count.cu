// Counts the tokens of a call once its last keys and values are in the ring: one thread per (sequence, kv head).
#include "window.cuh"

extern "C" __global__ void __launch_bounds__(256) window_count(const Params p, const u32 *far, u64 *seen) {
    u32 at = blockIdx.x * 256 + threadIdx.x;
    if (at < p.batch * KV_HEADS) seen[at] += far ? far[at / KV_HEADS] : p.near[at / KV_HEADS];
}
