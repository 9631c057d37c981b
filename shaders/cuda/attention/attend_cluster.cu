// Attention over all keys of a row, one cluster of blocks per (kv head, row), one span of tokens per block.
#define WARPS 8
#define THREADS (WARPS * 32)
#include "cluster.cuh"
#include "tiles.cuh"
#include "merge_cluster.cuh"

#if __CUDA_ARCH__ >= 900
extern __shared__ __align__(16) u8 memory[];

extern "C" __global__ void __launch_bounds__(THREADS, 1) attend_cluster(ARGUMENTS) {
    CALL;
    u32 rank = blockIdx.x, kv_head = blockIdx.y, row_index = p.first_row + blockIdx.z;
    Row row = p.rows[row_index];
    wait_for_earlier();
    let_later_start();
    Tiles work;
    Work& w = work.w;
    w.p = &p;
    w.sequence = row.sequence;
    w.kv_head = kv_head;
    w.first = min_u32(rank * p.span, row.visible);
    w.count = min_u32(p.span, row.visible - w.first);
    work.lane = threadIdx.x & 31;
    work.warp = threadIdx.x >> 5;
    work.stages = shared_address(memory) + work.warp * (STAGES * STAGE);
    work.stage = 0;
    // Rows of shared memory that copies do not fill: channels beyond the last, which must be finite.
#if HEAD_DIM % 16 != 0 || VALUE_DIM % 16 != 0
    for (u32 i = threadIdx.x; i < WARPS * STAGES * STAGE / 16; i += THREADS) ((uint4*)memory)[i] = uint4{0, 0, 0, 0};
    __syncthreads();
#endif
    const u32 tiles = (w.count + TILE - 1) / TILE;
    work.start(tiles);
    work.load_query(row_index, 0, HEADS);
#if QUERY_SHARED
    __syncthreads();
#endif
    work.run(tiles);
    merge_cluster(work, row_index, kv_head, rank, (float*)memory);
}
#else
// Only GPUs with clusters are asked for it.
extern "C" __global__ void attend_cluster(ARGUMENTS) {}
#endif
