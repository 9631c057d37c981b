// A query's side of scoring: one block per (some tables, kv head, row), for all scoring heads of the kv head. Also clears
// the row's histogram.
#include "query.cuh"

extern "C" __global__ void __launch_bounds__(QUERY_THREADS) hash_query(ARGUMENTS) {
    CALL;
    u32 kv_head = blockIdx.y, block_row = blockIdx.z;
    float w[WARP_CHANNELS];
    load_planes(p, blockIdx.x, kv_head, w);
    wait_for_earlier();
    u64 first = (u64)(block_row * KV_HEADS + kv_head) * SCORE_ROWS * (BINS + 1);
    for (u32 i = blockIdx.x * QUERY_THREADS + threadIdx.x; i < SCORE_ROWS * (BINS + 1); i += QUERY_BLOCKS * QUERY_THREADS)
        p.histogram[first + i] = 0;
    hash_tables(p, blockIdx.x, kv_head, block_row, w);
    let_later_start();
}
