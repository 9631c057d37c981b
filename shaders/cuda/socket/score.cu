// Scores every key of a span for the query heads of its kv head, stores levels, and counts them in the row's histogram:
// one block per (span of tokens, kv head, row).
#include "score_levels.cuh"
#if FAST == 1
#include "score_halves.cuh"
#elif FAST == 2
#include "score_bytes.cuh"
#elif FAST == 3
#include "score_codes.cuh"
#else
#include "score_any.cuh"
#endif

#if FAST == 1 || FAST == 3
// The block's heads in turns: their counts are in shared memory, beside the look-ups.
struct Put {
    const Call& p;
    const Row& row;
    u32 first_head, end;
    // From the first of the block's heads on.
    u16* scores;
    u32 stride;

    __device__ __forceinline__ void operator()(u32 head, u32 token, u32 level) const {
        u32 of_block = head - first_head;
        u32* counts = memory + LOOKUP_BYTES / 4 + of_block * BINS;
        bool contested = is_contested(p, row, token);
        put(level, of_block * stride + token, contested, scores, counts);
    }
};

__device__ void score_span(const Call& p, const Row& row, u32 kv_head, u32 block_row) {
    u32* counts = memory + LOOKUP_BYTES / 4;
    u64 table_row = (u64)(block_row * KV_HEADS + kv_head) * SCORING_HEADS;
    u64 score_row = (u64)(block_row * KV_HEADS + kv_head) * SCORE_ROWS;
    u32 first = blockIdx.x * p.span;
    u32 end = min_u32(row.visible, first + p.span);
    u32 stride = (row.visible + 63) / 64 * 64;
    u16* scores = p.scores + (u64)row.score_base * 64 + (u64)(kv_head * SCORE_ROWS) * stride;
    auto index = [&](u32 token) { return index_word(page_of(p, row.sequence, token), kv_head, 0, token); };
    for (u32 block = 0; block < (SCORING_HEADS + HEADS_TOGETHER - 1) / HEADS_TOGETHER; block++) {
        u32 first_head = MEAN_SCORE ? 0 : block * HEADS_TOGETHER, heads = min_u32(HEADS_TOGETHER, SCORE_ROWS - first_head);
        // The first keys are on their way while the query is hashed.
        auto ready = [&]() {
            __syncthreads();
            for (u32 i = threadIdx.x; i < heads * BINS; i += THREADS) counts[i] = 0;
            if (block == 0) begin();
#if FAST == 1
            fill_lookup(p, table_row, block, memory);
#else
            if (block == 0) fill_lookup(p, table_row, memory);
#endif
            __syncthreads();
        };
        Put put_levels = {p, row, first_head, end, scores + (u64)first_head * stride, stride};
        score_keys(p, row, kv_head, table_row, block, first, end, memory, index, ready, put_levels);
        __syncthreads();
        flush(p, score_row + first_head, counts, heads);
    }
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_TOGETHER) score(ARGUMENTS) {
    CALL;
    Row row = p.rows[p.first_row + blockIdx.z];
    // Rows that keep every key need no scores.
    if (blockIdx.x * p.span < row.visible && row.heavy < row.visible && row.heavy > 0)
        score_span(p, row, blockIdx.y, blockIdx.z);
    else begin();
}
