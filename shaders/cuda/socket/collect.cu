// Lists what a row selected, ascending, with exact scores: one block per score row.
#include "scoring.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)

extern "C" __global__ void __launch_bounds__(THREADS) collect(ARGUMENTS) {
    CALL;
    u32 score_row = blockIdx.x;
    u32 head = score_row % (KV_HEADS * SCORE_ROWS);
    u32 kv_head = head / SCORE_ROWS;
    u32 block_row = score_row / (KV_HEADS * SCORE_ROWS);
    Row row = p.rows[p.first_row + block_row];
    u64 table_row = (u64)(score_row / SCORE_ROWS) * SCORING_HEADS + (SCORE_ROWS == 1 ? 0 : head % SCORE_ROWS);
    wait_for_earlier();
    u64 stride = ((u64)row.visible + 63) / 64 * 64;
    const u16* scores = p.scores + (u64)row.score_base * 64 + head * stride;
    u32 cut = p.cuts[score_row];
    u64 results_at = ((u64)p.first_row * KV_HEADS * SCORE_ROWS + score_row) * p.width;
    u32 filled = 0;
    for (u32 first = 0; first < row.visible; first += THREADS) {
        u32 token = first + threadIdx.x;
        bool taken = false;
        if (token < row.visible) {
            taken = cut == CUT_ALL || in_base(p, row, token);
            if (!taken && cut != CUT_NONE) taken = is_selected(scores[token], cut);
        }
        u32 total, at = filled + block_scan<WARPS>(taken ? 1 : 0, total) - 1;
        if (taken && at < p.width) p.indices[results_at + at] = (int)token;
        filled += total;
    }
    filled = min_u32(filled, p.width);
    __syncthreads();
    const float* tables = p.tables + table_row * TABLE_ROW;
    for (u32 i = threadIdx.x; i < p.width; i += THREADS) {
        float score = 0.0f;
        if (i >= filled) p.indices[results_at + i] = -1;
        else if (row.unindexed == 0) score = exact_score(p, tables, row.sequence, kv_head, (u32)p.indices[results_at + i]);
        p.values[results_at + i] = score;
    }
}
