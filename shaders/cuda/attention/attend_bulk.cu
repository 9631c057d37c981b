// Attention of the query heads of one kv head over all keys of a span: one block per (span of tokens, kv head and tile of
// heads, row), 16-bit keys and values of whole 64 channels. The last block of a kv head merges the spans.
//
// One warp has tiles of 64 keys copied to shared memory, as many ahead as there is room for; each of the others takes
// 16 keys of every tile. Copies are fast only where they start on whole 128 bytes, so rows are not padded.
#define LINEAR 1
#include "attend_tile.cuh"
#include "bulk.cuh"

#define THREADS ((WARPS + 1) * 32)
#define KEYS (WARPS * TILE)
#define K_ROW (HEAD_DIM * 2)
#define V_ROW (VALUE_DIM * 2)
// Rows that a lane has copied at once.
#define RUNS 8
#define RUN (KEYS / RUNS)
#define STAGE (KEYS * (K_ROW + V_ROW))

extern __shared__ __align__(128) u8 memory[];

// A span's tiles and where they are copied to.
struct Tiles {
    const Call& p;
    u32 sequence, kv_head, first, count;
    Barrier *full, *empty;
    u32 stages, stage, parity;

    __device__ __forceinline__ u64 page_of_tile(u32 tile) const {
        return page_of(p, sequence, first + min_u32(tile * KEYS, count - 1));
    }

    __device__ __forceinline__ u32 at() const { return shared_address(memory) + stage * STAGE; }

    __device__ __forceinline__ void turn() {
        if (++stage == stages) {
            stage = 0;
            parity ^= 1;
        }
    }

    // Has tiles copied, by the warp that does that. Stages are free at first.
    __device__ __forceinline__ void copy(u32 tile, u32 end) {
        const u32 lane = threadIdx.x & 31;
        u64 page = page_of_tile(tile);
        for (; tile < end; tile++) {
            u32 token = first + tile * KEYS, keys = min_u32(KEYS, count - tile * KEYS);
            u64 from_keys = key_row(page, kv_head, token), from_values = value_row(page, kv_head, token);
            // Asked for a round before it is needed.
            page = page_of_tile(tile + 1);
            barrier_wait(&empty[stage], parity ^ 1);
            if (keys < KEYS) {
                // Rows that are not there have no weight, but must be finite.
                for (u32 i = lane; i < STAGE / 16; i += 32) store_four(at() + i * 16, uint4{0, 0, 0, 0});
                copies_follow();
                __syncwarp();
            }
            if (lane == 0) barrier_expect(&full[stage], keys * (K_ROW + V_ROW));
            __syncwarp();
            u32 from = lane % RUNS * RUN, rows = keys > from ? min_u32(RUN, keys - from) : 0;
            if (lane < RUNS && rows > 0) copy_bulk(at() + from * K_ROW, from_keys + from * K_ROW, rows * K_ROW, &full[stage]);
            if (lane / RUNS == 1 && rows > 0)
                copy_bulk(at() + KEYS * K_ROW + from * V_ROW, from_values + from * V_ROW, rows * V_ROW, &full[stage]);
            turn();
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_TOGETHER) attend_bulk(ARGUMENTS) {
    CALL;
    __shared__ Barrier full[MOST_STAGES], empty[MOST_STAGES];
    __shared__ __align__(16) u16 parts[QUERY_PARTS];
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Heads heads = heads_of_block();
    u32 row_index = p.first_row + blockIdx.z;
    Row row = ROW_AT(row_index);
    u32 first = blockIdx.x * p.span;
    if (threadIdx.x < MOST_STAGES) {
        barrier_init(&full[threadIdx.x], 1);
        barrier_init(&empty[threadIdx.x], WARPS);
        barriers_ready();
    }
    wait_for_earlier();
    if (first >= row.visible) {
        if (row.visible == 0 && blockIdx.x == 0) store_nothing<THREADS>(p, row_index, heads);
        return;
    }
    const u32 count = min_u32(p.span, row.visible - first), tiles = (count + KEYS - 1) / KEYS;
    const u32 room = min_u32(dynamic_shared() / STAGE, MOST_STAGES), ahead = min_u32(tiles, room);
    Tiles ring = {p, row.sequence, heads.kv_head, first, count, full, empty, room, 0, 0};
    const bool copies = warp == WARPS;
    __syncthreads();
    if (copies) ring.copy(0, ahead);
    split_query<THREADS>(p, parts, row_index, heads);
    Attention attention;
    attention.begin(p, parts);
    if (copies) {
        ring.copy(ahead, tiles);
    } else {
        const u32 keys_at = (warp * TILE + lane / 4) * K_ROW + lane % 4 * 16;
        const u32 values_at = KEYS * K_ROW + (warp * TILE + lane % 4 * 2) * V_ROW + lane / 4 * 16;
        for (u32 tile = 0; tile < tiles; tile++) {
            u32 base = tile * KEYS + warp * TILE;
            barrier_wait(&full[ring.stage], ring.parity);
            attention.add(ring.at() + keys_at, ring.at() + values_at, [&](u32 key) { return All{base + key < count}; });
            __syncwarp();
            if (lane == 0) barrier_arrive(&empty[ring.stage]);
            ring.turn();
        }
    }
    __syncthreads();
    float* results = (float*)memory;
    if (!copies) attention.store(results + warp * RESULT);
    __syncthreads();
    merge_results<THREADS>(p, row, row_index, heads, results);
}
