// Scores every key of a span for the query heads of its kv head, stores levels, and counts them in the row's histogram:
// one block per (span of tokens, kv head, row).

#ifndef THREADS
#if FAST == 2
#define THREADS 256
#define BLOCKS_TOGETHER 3
#else
#define THREADS 512
#define BLOCKS_TOGETHER 2
#endif
#endif
#ifndef EARLY_LOADS
#define EARLY_LOADS (FAST == 2 ? 2 : 0)
#endif
#include "score_keys.cuh"

#define CODE_MASK ((1u << PLANES) - 1u)

extern __shared__ __align__(256) u32 memory[];

// Counts a level, and stores it.
__device__ __forceinline__ void put(u32 level, u32 token, bool contested, u16* scores, u32* counts) {
    scores[token] = (u16)level;
    if (contested) atomicAdd(&counts[level >> BIN_SHIFT], 1u);
}

__device__ __forceinline__ bool is_contested(const Call& p, const Row& row, u32 token) {
#if DISJOINT
    return !in_base(p, row, token);
#else
    return true;
#endif
}

__device__ __forceinline__ void flush(const Call& p, u64 score_row, const u32* counts, u32 heads) {
    for (u32 i = threadIdx.x; i < heads * BINS; i += THREADS) {
        u32 count = counts[i];
        if (count > 0) atomicAdd(&p.histogram[(score_row + i / BINS) * (BINS + 1) + i % BINS], count);
    }
}

#if FAST
// The block's heads in turns: their counts are in shared memory, beside the look-ups.
struct Put {
    const Call& p;
    const Row& row;
    u16* scores;
    u32 stride;
    u32* counts;
    u32 first_head, end;

    __device__ __forceinline__ void operator()(u32 head, u32 token, u32 level) const {
#ifdef PROBE
        if (level < PROBE) return;
#endif
        put(level, token, is_contested(p, row, token), scores + (u64)head * stride, counts + (head - first_head) * BINS);
    }
    // Of four neighbouring tokens.
    __device__ __forceinline__ void operator()(u32 head, u32 token, const u32 (&levels)[4]) const {
#ifdef PROBE
        if (max_u32(max_u32(levels[0], levels[1]), max_u32(levels[2], levels[3])) < PROBE) return;
#endif
        // Rows are padded to whole 64 scores, so that the last ones may be written whole.
        if (token < end) *(uint2*)&scores[(u64)head * stride + token] = uint2{levels[0] | levels[1] << 16, levels[2] | levels[3] << 16};
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (token + i < end && is_contested(p, row, token + i))
                atomicAdd(&counts[(head - first_head) * BINS + (levels[i] >> BIN_SHIFT)], 1u);
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
#if FAST == 2
    __shared__ Scales scales[HEAD_BLOCKS * 4];
    fill_lookup(p, table_row, memory, scales);
#elif FAST == 3
    fill_lookup(p, table_row, memory);
#endif
    for (u32 block = 0; block < (SCORING_HEADS + HEADS_TOGETHER - 1) / HEADS_TOGETHER; block++) {
        u32 first_head = MEAN_SCORE ? 0 : block * HEADS_TOGETHER, heads = min_u32(HEADS_TOGETHER, SCORE_ROWS - first_head);
        __syncthreads();
#if FAST == 1
        fill_lookup(p, table_row, block, memory);
#endif
        for (u32 i = threadIdx.x; i < heads * BINS; i += THREADS) counts[i] = 0;
        __syncthreads();
        Put put_levels = {p, row, scores, stride, counts, first_head, end};
#if FAST == 2
        score_keys<EARLY_LOADS>(p, row, kv_head, table_row, block, first, end, memory, scales, index, put_levels);
#else
        score_keys<EARLY_LOADS>(p, row, kv_head, table_row, block, first, end, memory, index, put_levels);
#endif
        __syncthreads();
        flush(p, score_row + first_head, counts, heads);
    }
}
#else
// Any scoring, in f32: look-ups of HEADS_PER_PASS heads and BLOCK_TABLES tables at a time in shared memory.
#define BLOCK_ENTRIES (BLOCK_TABLES * DIGITS * 16)
#define TABLE_BLOCKS ((TABLES + BLOCK_TABLES - 1) / BLOCK_TABLES)
#define PASSES ((SCORING_HEADS + HEADS_PER_PASS - 1) / HEADS_PER_PASS)

__device__ void score_span(const Call& p, const Row& row, u32 kv_head, u32 block_row) {
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
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_TOGETHER) score(ARGUMENTS) {
    CALL;
    Row row = p.rows[p.first_row + blockIdx.z];
    wait_for_earlier();
    // Rows that keep every key need no scores.
    if (blockIdx.x * p.span < row.visible && row.heavy < row.visible && row.heavy > 0)
        score_span(p, row, blockIdx.y, blockIdx.z);
    let_later_start();
}
