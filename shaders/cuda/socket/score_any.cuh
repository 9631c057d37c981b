// Any scoring, in f32: look-ups of HEADS_PER_PASS heads and BLOCK_TABLES tables at a time in shared memory.
#pragma once
#include "score_levels.cuh"

#define CODE_MASK ((1u << PLANES) - 1u)
#define BLOCK_ENTRIES (BLOCK_TABLES * DIGITS * 16)
#define TABLE_BLOCKS ((TABLES + BLOCK_TABLES - 1) / BLOCK_TABLES)
#define PASSES ((SCORING_HEADS + HEADS_PER_PASS - 1) / HEADS_PER_PASS)

__device__ __forceinline__ void score_span(const Call& p, const Row& row, u32 kv_head, u32 block_row) {
    u32 lane = threadIdx.x & 31;
    float* lookup = (float*)memory;
    u32* counts = memory + HEADS_PER_PASS * BLOCK_ENTRIES;
    u64 table_row = (u64)(block_row * KV_HEADS + kv_head) * SCORING_HEADS;
    u32 first = blockIdx.x * p.span;
    u32 end = min_u32(row.visible, first + p.span);
    u64 stride = ((u64)row.visible + 63) / 64;
#if MEAN_SCORE
    // All heads of a batch of keys first, then their mean.
    const u32 outer = 1;
#else
    const u32 outer = PASSES;
#endif
    u32 loaded = ~0u;
    begin();
    for (u32 out = 0; out < outer; out++) {
        __syncthreads();
        u32 score_heads = MEAN_SCORE ? 1 : min_u32(HEADS_PER_PASS, SCORING_HEADS - out * HEADS_PER_PASS);
        for (u32 i = threadIdx.x; i < HEADS_PER_PASS * BINS; i += THREADS) counts[i] = 0;
        Range ranges[HEADS_PER_PASS];
#pragma unroll
        for (u32 h = 0; h < HEADS_PER_PASS; h++) {
            u32 head = MEAN_SCORE ? 0 : min_u32(out * HEADS_PER_PASS + h, SCORING_HEADS - 1);
            ranges[h] = range_of(p, row, kv_head, table_row + head, lane);
        }
        u16* scores = p.scores + ((u64)row.score_base + (kv_head * SCORE_ROWS + (MEAN_SCORE ? 0 : out * HEADS_PER_PASS)) * stride) * 64;
        for (u32 base = first; base < end; base += THREADS) {
            // Surplus threads read along and write nothing.
            u32 token = base + threadIdx.x, safe = min_u32(token, end - 1);
            u64 page = page_of(p, row.sequence, safe);
            const u32* index = index_word(page, kv_head, 0, safe);
            float gain = 1.0f, bias = 0.0f;
#if GAIN
            gain = bits_float(__ldg(&index[WORDS * PAGE]));
#endif
#if BIAS
            bias = bits_float(__ldg(&index[(WORDS + 1) * PAGE]));
#endif
            float mean = 0.0f;
            for (u32 pass = MEAN_SCORE ? 0 : out; pass < (MEAN_SCORE ? PASSES : out + 1); pass++) {
                float sums[HEADS_PER_PASS] = {};
                for (u32 block = 0; block < TABLE_BLOCKS; block++) {
                    u32 first_table = block * BLOCK_TABLES;
                    if (loaded != pass * TABLE_BLOCKS + block) {
                        loaded = pass * TABLE_BLOCKS + block;
                        __syncthreads();
                        for (u32 i = threadIdx.x; i < HEADS_PER_PASS * BLOCK_ENTRIES; i += THREADS) {
                            u32 head = pass * HEADS_PER_PASS + i / BLOCK_ENTRIES;
                            u32 at = first_table * DIGITS * 16 + i % BLOCK_ENTRIES;
                            bool inside = head < SCORING_HEADS && at < ENTRIES;
                            lookup[i] = inside ? p.tables[(table_row + head) * TABLE_ROW + at] : 0.0f;
                        }
                        __syncthreads();
                    }
                    const u32 block_words = (BLOCK_TABLES + TABLES_PER_WORD - 1) / TABLES_PER_WORD;
#pragma unroll 4
                    for (u32 w = 0; w < block_words; w++) {
                        u32 word = first_table / TABLES_PER_WORD + w;
                        u32 codes = word < WORDS ? __ldg(&index[word * PAGE]) : 0;
#pragma unroll
                        for (u32 t = 0; t < TABLES_PER_WORD; t++) {
                            if (first_table + w * TABLES_PER_WORD + t < TABLES) {
                                u32 code = codes >> (t * PLANES) & CODE_MASK;
#pragma unroll
                                for (u32 h = 0; h < HEADS_PER_PASS; h++)
                                    sums[h] += table_value(lookup + h * BLOCK_ENTRIES, w * TABLES_PER_WORD + t, code);
                            }
                        }
                    }
                }
#pragma unroll
                for (u32 h = 0; h < HEADS_PER_PASS; h++) {
                    float score = gain * sums[h] + (bias + ranges[h].shift);
                    if (MEAN_SCORE) {
                        if (pass * HEADS_PER_PASS + h < SCORING_HEADS) mean += score;
                    } else if (h < score_heads && token < end) {
                        put(level_of(score, ranges[h]), token, is_contested(p, row, token), scores + h * stride * 64, counts + h * BINS);
                    }
                }
            }
            if (MEAN_SCORE && token < end)
                put(level_of(mean * (1.0f / SCORING_HEADS), ranges[0]), token, is_contested(p, row, token), scores, counts);
        }
        __syncthreads();
        u64 score_row = (u64)(block_row * KV_HEADS + kv_head) * SCORE_ROWS + (MEAN_SCORE ? 0 : out * HEADS_PER_PASS);
        flush(p, score_row, counts, score_heads);
    }
}
