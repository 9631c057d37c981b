// Scores of keys, exact and as levels.
//
// A query's side, per (row, kv head, scoring head): look-up tables, projections, the largest sums of each block of
// tables, and the shift. A key's score is gain · Σ + bias + shift. Scores are stored as levels of 16 bits between the
// least and the largest possible; the kernel that scores may be off by a known margin, and keys within that margin of
// the threshold are scored again, exactly.
#pragma once
#include "params.cuh"

#define SOFT_COLLISION 0
#define SIGN_PROJECTION 1
#define HARD_COLLISION 2
#define HAMMING 3
#define PRODUCT (SCORING == SOFT_COLLISION || SCORING == HARD_COLLISION)

#define BITS (TABLES * PLANES)
#define DIGITS ((PLANES + 3) / 4)
#define TABLES_PER_WORD (32 / PLANES)
#define ENTRIES (TABLES * DIGITS * 16)
// Tables that one block of the query hasher works on.
#define QUERY_TABLES (PLANES >= 32 ? 1 : 32 / PLANES)
#define QUERY_BLOCKS ((TABLES + QUERY_TABLES - 1) / QUERY_TABLES)
#define AT_PROJECTIONS ENTRIES
#define AT_BOUNDS (ENTRIES + BITS)
#define AT_SHIFT (AT_BOUNDS + QUERY_BLOCKS)
#define TABLE_ROW ((AT_SHIFT + 1 + 3) / 4 * 4)

#define LEVELS 65533
#define LEVEL_SELECTED 65535
// Levels of a bin: 65536 / BINS.
#define BIN_SHIFT 5
// Cuts that need no look at the scores: every key, and none beyond sink and window.
#define CUT_ALL 0u
#define CUT_NONE 65537u

// How far the scores that are stored may be off, beside rounding: relative, and in units of the largest gain.
#if FAST == 1
#define RELATIVE_ERROR 2.0e-3f
#else
#define RELATIVE_ERROR 1.0e-5f
#endif

__device__ __forceinline__ float key_gain(float value_norm, float key_square, float projection_sum) {
#if SCORING == SIGN_PROJECTION
    return projection_sum > 0.0f ? key_square / projection_sum : 0.0f;
#else
    return value_norm;
#endif
}
__device__ __forceinline__ float key_bias(float value_norm) { return logf(fmaxf(value_norm, 1.17549435e-38f)); }

#define MEAN_WORDS (KV_HEADS * HEAD_DIM)
#define SLOT_WORDS (KV_HEADS * (HEAD_DIM + 1))
__device__ __forceinline__ float largest_gain(const Call& p, u32 slot, u32 kv_head) {
#if GAIN
    return bits_float(p.state[(u64)slot * SLOT_WORDS + MEAN_WORDS + kv_head]);
#else
    return 1.0f;
#endif
}

// Bounds of a score row and how to get from scores to levels.
struct Range {
    float low, inverse_width, shift, magnitude;
};

// By a whole warp; the same bits wherever it is called.
__device__ __forceinline__ Range range_of(const Call& p, const Row& row, u32 kv_head, u64 table_row, u32 lane) {
    Range range;
    float high = 0.0f, shift = 0.0f;
#if MEAN_SCORE
    const u32 heads = SCORING_HEADS;
#else
    const u32 heads = 1;
#endif
    for (u32 h = 0; h < heads; h++) {
        const float* tables = p.tables + (table_row + h) * TABLE_ROW;
        float sum = 0.0f;
        for (u32 i = lane; i < QUERY_BLOCKS; i += 32) sum += tables[AT_BOUNDS + i];
        high = fmaxf(high, warp_sum(sum));
        shift = tables[AT_SHIFT];
    }
    high *= largest_gain(p, row.slot, kv_head);
    float low = SCORING == SIGN_PROJECTION ? -high : 0.0f;
#if BIAS
    // ln ‖v‖ of any finite value of any dtype lies within.
    low -= 100.0f;
    high += 100.0f;
#endif
    range.magnitude = fmaxf(fabsf(low), fabsf(high));
    range.low = low + shift;
    range.shift = shift;
    range.inverse_width = high > low ? divide((float)LEVELS, high - low) : 0.0f;
    return range;
}

// 1 to 65534; NaN ranks lowest.
__device__ __forceinline__ u32 level_of(float score, const Range& range) {
    float at = (score - range.low) * range.inverse_width;
    return 1u + (u32)fminf(fmaxf(at, 0.0f), (float)LEVELS);
}

// Levels by which a stored score near `level` may differ from the exact one, twice.
__device__ __forceinline__ u32 margin_of(u32 level, const Range& range, float absolute) {
    float width = range.inverse_width > 0.0f ? divide(1.0f, range.inverse_width) : 0.0f;
    float score = range.low - range.shift + (float)level * width;
    float error = RELATIVE_ERROR * fabsf(score) + absolute + 2.0e-6f * range.magnitude;
    return 2u + (u32)fminf(2.0f * error * range.inverse_width, 65536.0f);
}

__device__ __forceinline__ u32 order_key(float score) {
    u32 bits = float_bits(score);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 1u;
    if ((bits & 0x7fffffffu) == 0u) return 0x80000000u;
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}

// What one table says of a code.
__device__ __forceinline__ float table_value(const float* tables, u32 table, u32 code) {
    const float* entries = tables + table * (DIGITS * 16);
    float value = entries[code & 15u];
#pragma unroll
    for (u32 d = 1; d < DIGITS; d++) {
        float next = entries[d * 16 + (code >> (4 * d) & 15u)];
        value = PRODUCT ? value * next : value + next;
    }
    return value;
}

__device__ __forceinline__ bool is_selected(u32 level, u32 cut) { return level >= cut || level == LEVEL_SELECTED; }

#if MEAN_SCORE
#define EXACT_HEADS SCORING_HEADS
#else
#define EXACT_HEADS 1
#endif

// Parts of the sum over tables, which are added as a tree: whether one thread or eight lanes add, the bits are the same.
#define EXACT_PARTS 8

// What words `part`, `part` + 8, ... of a key's index say.
__device__ __forceinline__ float exact_part(const u32* index, const float* tables, u32 part) {
    const u32 unrolled = EXACT_HEADS > 1 ? 1 : 2;
    float sum = 0.0f;
#pragma unroll unrolled
    for (u32 w = part; w < WORDS; w += EXACT_PARTS) {
        u32 codes = index[w * PAGE];
#pragma unroll
        for (u32 t = 0; t < TABLES_PER_WORD; t++)
            if (TABLES % TABLES_PER_WORD == 0 || w * TABLES_PER_WORD + t < TABLES)
                sum += table_value(tables, w * TABLES_PER_WORD + t, codes >> (t * PLANES) & ((1u << PLANES) - 1u));
    }
    return sum;
}

__device__ __forceinline__ float key_gain_at(const u32* index) { return GAIN ? bits_float(index[WORDS * PAGE]) : 1.0f; }
__device__ __forceinline__ float key_bias_at(const u32* index) { return BIAS ? bits_float(index[(WORDS + 1) * PAGE]) : 0.0f; }

// The score of one key, by one thread, from the tables of EXACT_HEADS scoring heads.
__device__ __forceinline__ float exact_score(const Call& p, const float* tables, u32 sequence, u32 kv_head, u32 token) {
    const u32* index = index_word(page_of(p, sequence, token), kv_head, 0, token);
    float gain = key_gain_at(index), bias = key_bias_at(index), score = 0.0f;
    for (u32 h = 0; h < EXACT_HEADS; h++, tables += TABLE_ROW) {
        float parts[EXACT_PARTS];
#pragma unroll
        for (u32 i = 0; i < EXACT_PARTS; i++) parts[i] = exact_part(index, tables, i);
#pragma unroll
        for (u32 step = EXACT_PARTS / 2; step > 0; step /= 2)
#pragma unroll
            for (u32 i = 0; i < step; i++) parts[i] += parts[i + step];
        score += gain * parts[0] + (bias + tables[AT_SHIFT]);
    }
    return score * (1.0f / EXACT_HEADS);
}

// The same by eight neighbouring lanes; all lanes of the warp call it.
__device__ __forceinline__ float exact_score_shared(const Call& p, const float* tables, u32 sequence, u32 kv_head, u32 token) {
    const u32* index = index_word(page_of(p, sequence, token), kv_head, 0, token);
    float gain = key_gain_at(index), bias = key_bias_at(index), score = 0.0f;
    for (u32 h = 0; h < EXACT_HEADS; h++, tables += TABLE_ROW) {
        float sum = exact_part(index, tables, threadIdx.x % EXACT_PARTS);
#pragma unroll
        for (u32 step = EXACT_PARTS / 2; step > 0; step /= 2) sum += __shfl_xor_sync(FULL_WARP, sum, step);
        score += gain * sum + (bias + tables[AT_SHIFT]);
    }
    return score * (1.0f / EXACT_HEADS);
}
