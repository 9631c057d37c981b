// Scores every key of a span for the query heads of its kv head, stores levels, and counts them in the row's histogram:
// one block per (span of tokens, kv head, row).
#include "scoring.cuh"

// Registers set how many there are.
#if FAST == 2
#define THREADS 256
#define BLOCKS_TOGETHER 3
#else
#define THREADS 512
#define BLOCKS_TOGETHER 2
#endif
#define CODE_MASK ((1u << PLANES) - 1u)

extern __shared__ u32 memory[];

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

#if FAST == 2
// Sums over sign bits as products of bytes on the matrix unit: bits are 0 or 1, projections are two digits of a fixed
// point number, in two columns of b each. A lane holds the sums of one head for four neighbouring keys.
#define HEAD_BLOCKS ((SCORING_HEADS + 3) / 4)
#define B_WORDS (WORDS * 2 * 32)

// Index words of 32 keys: a lane has those of four neighbours.
__device__ __forceinline__ void load_index(const Call& p, const Row& row, u32 kv_head, u32 base, u32 lane, uint4 (&words)[INDEX_WORDS]) {
    u64 page = page_of(p, row.sequence, base);
#pragma unroll
    for (u32 w = 0; w < INDEX_WORDS; w++) words[w] = __ldg((const uint4*)index_word(page, kv_head, w, base + lane / 4 * 4));
}

__device__ void score_span(const Call& p, const Row& row, u32 kv_head, u32 block_row) {
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32* counts = memory;
    u32* fragments = memory + SCORE_ROWS * BINS;
    __shared__ float units[HEAD_BLOCKS * 4];
    __shared__ float inverses[HEAD_BLOCKS * 4];
    __shared__ float offsets[HEAD_BLOCKS * 4];
    u64 table_row = (u64)(block_row * KV_HEADS + kv_head) * SCORING_HEADS;
    for (u32 i = threadIdx.x; i < SCORE_ROWS * BINS; i += THREADS) counts[i] = 0;
    for (u32 h = warp; h < SCORING_HEADS; h += THREADS / 32) {
        const float* u = p.tables + (table_row + h) * TABLE_ROW + AT_PROJECTIONS;
        float largest = 0.0f, sum = 0.0f;
        for (u32 i = lane; i < BITS; i += 32) largest = fmaxf(largest, fabsf(u[i]));
        for (u32 step = 16; step > 0; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
        float inverse = largest > 0.0f ? 16256.0f / largest : 0.0f;
        for (u32 i = lane; i < BITS; i += 32) sum += rintf(u[i] * inverse);
        sum = warp_sum(sum);
        if (lane == 0) {
            units[h] = largest * (1.0f / 16256.0f);
            inverses[h] = inverse;
            offsets[h] = sum;
        }
    }
    __syncthreads();
    // Fragment of b, per (head block, word, half, lane): bytes k = 16·half + 4·(lane % 4) + i of column lane / 4, where
    // byte k stands for bit lane % 4 + 4·half + 8·i of the word.
    for (u32 at = threadIdx.x; at < HEAD_BLOCKS * B_WORDS; at += THREADS) {
        u32 of_lane = at % 32, half = at / 32 % 2, word = at / 64 % WORDS, block = at / B_WORDS;
        u32 column = of_lane / 4, head = block * 4 + column / 2;
        u32 bytes = 0;
        if (head < SCORING_HEADS) {
            const float* u = p.tables + (table_row + head) * TABLE_ROW + AT_PROJECTIONS;
            float inverse = inverses[head];
            for (u32 i = 0; i < 4; i++) {
                u32 bit = of_lane % 4 + 4 * half + 8 * i;
                u32 table = word * TABLES_PER_WORD + bit / PLANES;
                if (bit / PLANES < TABLES_PER_WORD && table < TABLES) {
                    float x = u[table * PLANES + PLANES - 1 - bit % PLANES];
                    int value = (int)rintf(x * inverse);
                    int high = (value + 64) >> 7;
                    int digit = column % 2 == 0 ? high : value - high * 128;
                    bytes |= (u32)(digit & 255) << (8 * i);
                }
            }
        }
        fragments[at] = bytes;
    }
    __syncthreads();
    u32 first = blockIdx.x * p.span;
    u32 end = min_u32(row.visible, first + p.span);
    u64 stride = ((u64)row.visible + 63) / 64;
    for (u32 block = 0; block < HEAD_BLOCKS; block++) {
        u32 head = block * 4 + lane % 4;
        bool mine = head < SCORING_HEADS;
        Range range = range_of(p, row, kv_head, table_row + min_u32(block * 4, SCORING_HEADS - 1), lane);
        for (u32 h = 1; h < 4; h++) {
            Range other = range_of(p, row, kv_head, table_row + min_u32(block * 4 + h, SCORING_HEADS - 1), lane);
            if (lane % 4 == h) range = other;
        }
        float unit = mine ? units[head] : 0.0f, offset = mine ? offsets[head] : 0.0f;
        u32 score_head = mine ? head : 0;
        u16* scores = p.scores + ((u64)row.score_base + (kv_head * SCORE_ROWS + score_head) * stride) * 64;
        u32 base = first + warp * 32;
        uint4 next[INDEX_WORDS];
        if (base < end) load_index(p, row, kv_head, base, lane, next);
        for (; base < end; base += THREADS) {
            u32 token = base + lane / 4 * 4;
            uint4 index[INDEX_WORDS];
#pragma unroll
            for (u32 w = 0; w < INDEX_WORDS; w++) index[w] = next[w];
            // The next keys are on their way while these are scored.
            if (base + THREADS < end) load_index(p, row, kv_head, base + THREADS, lane, next);
            int sums[2][4] = {};
#pragma unroll
            for (u32 w = 0; w < WORDS; w++) {
                uint4 words = index[w];
                u32 b0 = fragments[block * B_WORDS + w * 64 + lane], b1 = fragments[block * B_WORDS + w * 64 + 32 + lane];
                u32 of[4] = {words.x >> (lane % 4), words.y >> (lane % 4), words.z >> (lane % 4), words.w >> (lane % 4)};
#pragma unroll
                for (u32 t = 0; t < 2; t++) {
                    u32 a[4] = {of[2 * t] & 0x01010101u, of[2 * t + 1] & 0x01010101u,
                                of[2 * t] >> 4 & 0x01010101u, of[2 * t + 1] >> 4 & 0x01010101u};
                    mma_bytes(sums[t], a, b0, b1);
                }
            }
            uint4 gain = index[WORDS];
            uint4 bias = index[INDEX_WORDS - 1];
            u32 gains[4] = {gain.x, gain.y, gain.z, gain.w}, biases[4] = {bias.x, bias.y, bias.z, bias.w};
            u32 levels[4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                float sum = (float)(128 * sums[i / 2][i % 2 * 2] + sums[i / 2][i % 2 * 2 + 1]);
                float score = bits_float(gains[i]) * ((2.0f * sum - offset) * unit) + range.shift;
                if (BIAS) score += bits_float(biases[i]);
                levels[i] = level_of(score, range);
            }
            if (mine) {
                uint2 packed = {levels[0] | levels[1] << 16, levels[2] | levels[3] << 16};
                // Rows are padded to whole 64 scores, so that the last ones may be written whole.
                if (token < end) *(uint2*)&scores[token] = packed;
#pragma unroll
                for (u32 i = 0; i < 4; i++)
                    if (token + i < end && is_contested(p, row, token + i))
                        atomicAdd(&counts[score_head * BINS + (levels[i] >> BIN_SHIFT)], 1u);
            }
        }
    }
    __syncthreads();
    flush(p, (u64)(block_row * KV_HEADS + kv_head) * SCORE_ROWS, counts, SCORE_ROWS);
}
#elif FAST == 1
// Products of two look-ups of four heads at once, in halves: entries of a digit are 128 bytes, so that look-ups of a
// warp never meet in a bank.
struct Pair {
    u32 low, high;
};
__device__ __forceinline__ u32 half_mul(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
__device__ __forceinline__ u32 half_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
#define HEAD_BLOCKS ((SCORING_HEADS + 3) / 4)
#define AHEAD 1

__device__ void score_span(const Call& p, const Row& row, u32 kv_head, u32 block_row) {
    u32 lane = threadIdx.x & 31;
    Pair* lookup = (Pair*)memory;
    u32* counts = memory + (TABLES + 3) / 4 * 4 * 2 * 16 * 2;
    u64 table_row = (u64)(block_row * KV_HEADS + kv_head) * SCORING_HEADS;
    u32 first = blockIdx.x * p.span;
    u32 end = min_u32(row.visible, first + p.span);
    u64 stride = ((u64)row.visible + 63) / 64;
    for (u32 block = 0; block < HEAD_BLOCKS; block++) {
        __syncthreads();
        for (u32 i = threadIdx.x; i < (TABLES + 3) / 4 * 4 * 2 * 16; i += THREADS) {
            float entry[4];
            for (u32 h = 0; h < 4; h++) {
                bool inside = block * 4 + h < SCORING_HEADS && i < ENTRIES;
                entry[h] = inside ? p.tables[(table_row + block * 4 + h) * TABLE_ROW + i] : 0.0f;
            }
            lookup[i] = Pair{pack_pair<DTYPE_F16>(entry[0], entry[1]), pack_pair<DTYPE_F16>(entry[2], entry[3])};
        }
        for (u32 i = threadIdx.x; i < 4 * BINS; i += THREADS) counts[i] = 0;
        Range ranges[4];
        for (u32 h = 0; h < 4; h++)
            ranges[h] = range_of(p, row, kv_head, table_row + min_u32(block * 4 + h, SCORING_HEADS - 1), lane);
        __syncthreads();
        u16* scores = p.scores + ((u64)row.score_base + (kv_head * SCORE_ROWS + block * 4) * stride) * 64;
        for (u32 token = first + threadIdx.x; token < end; token += THREADS) {
            u64 page = page_of(p, row.sequence, token);
            const u32* index = index_word(page, kv_head, 0, token);
            u32 words[WORDS];
#pragma unroll
            for (u32 w = 0; w < WORDS; w++) words[w] = __ldg(&index[w * PAGE]);
            float gain = 1.0f;
#if GAIN
            gain = bits_float(__ldg(&index[WORDS * PAGE]));
#endif
            float sums[4] = {};
#pragma unroll
            for (u32 w = 0; w < WORDS; w++) {
                // Byte offsets of the two digits of all four codes.
                u32 low = words[w] << 3 & 0x78787878u, high = words[w] >> 1 & 0x78787878u;
#pragma unroll
                for (u32 t = 0; t < 4; t += 2) {
                    const u8* at = (const u8*)lookup + (w * 4 + t) * 256;
                    Pair a0 = *(const Pair*)(at + (low >> (8 * t) & 255u)), b0 = *(const Pair*)(at + 128 + (high >> (8 * t) & 255u));
                    at += 256;
                    Pair a1 = *(const Pair*)(at + (low >> (8 * t + 8) & 255u)), b1 = *(const Pair*)(at + 128 + (high >> (8 * t + 8) & 255u));
                    u32 x = half_fma(a1.low, b1.low, half_mul(a0.low, b0.low));
                    u32 y = half_fma(a1.high, b1.high, half_mul(a0.high, b0.high));
                    sums[0] += widen<DTYPE_F16>(x & 0xffffu);
                    sums[1] += widen<DTYPE_F16>(x >> 16);
                    sums[2] += widen<DTYPE_F16>(y & 0xffffu);
                    sums[3] += widen<DTYPE_F16>(y >> 16);
                }
            }
            bool contested = is_contested(p, row, token);
#pragma unroll
            for (u32 h = 0; h < 4; h++)
                if (block * 4 + h < SCORING_HEADS)
                    put(level_of(gain * sums[h], ranges[h]), token, contested, scores + h * stride * 64, counts + h * BINS);
        }
        __syncthreads();
        flush(p, (u64)(block_row * KV_HEADS + kv_head) * SCORE_ROWS + block * 4, counts, min_u32(4, SCORING_HEADS - block * 4));
    }
}
#elif FAST == 3
// Look-ups of 8-bit codes in f32, one head at a time: an entry's place is cut out of the word as a byte.
__device__ void score_span(const Call& p, const Row& row, u32 kv_head, u32 block_row) {
    u32 lane = threadIdx.x & 31;
    const u32 entries = WORDS * 4 * 32;
    float* lookup = (float*)memory;
    u32* counts = memory + SCORING_HEADS * entries;
    u64 table_row = (u64)(block_row * KV_HEADS + kv_head) * SCORING_HEADS;
    u32 first = blockIdx.x * p.span;
    u32 end = min_u32(row.visible, first + p.span);
    u64 stride = ((u64)row.visible + 63) / 64 * 64;
    for (u32 i = threadIdx.x; i < SCORING_HEADS * entries; i += THREADS) {
        bool inside = i % entries < ENTRIES;
        lookup[i] = inside ? p.tables[(table_row + i / entries) * TABLE_ROW + i % entries] : 0.0f;
    }
    for (u32 i = threadIdx.x; i < SCORE_ROWS * BINS; i += THREADS) counts[i] = 0;
    __syncthreads();
    u16* scores = p.scores + (u64)row.score_base * 64 + kv_head * SCORE_ROWS * stride;
    for (u32 h = 0; h < SCORING_HEADS; h += MEAN_SCORE ? SCORING_HEADS : 1) {
        Range range = range_of(p, row, kv_head, table_row + h, lane);
        for (u32 token = first + threadIdx.x; token < end; token += THREADS) {
            u64 page = page_of(p, row.sequence, token);
            const u32* index = index_word(page, kv_head, 0, token);
            u32 words[WORDS];
#pragma unroll
            for (u32 w = 0; w < WORDS; w++) words[w] = __ldg(&index[w * PAGE]);
            float gain = 1.0f, bias = 0.0f;
#if GAIN
            gain = bits_float(__ldg(&index[WORDS * PAGE]));
#endif
#if BIAS
            bias = bits_float(__ldg(&index[(WORDS + 1) * PAGE]));
#endif
            float score = 0.0f;
            const u32 heads = MEAN_SCORE ? SCORING_HEADS : 1;
            for (u32 m = 0; m < heads; m++) {
                const u8* at = (const u8*)(lookup + (h + m) * entries);
                float sums[2] = {0.0f, 0.0f};
#pragma unroll
                for (u32 w = 0; w < WORDS; w++) {
                    // Byte offsets of the two digits of all four codes.
                    u32 low = words[w] << 2 & 0x3c3c3c3cu, high = words[w] >> 2 & 0x3c3c3c3cu;
#pragma unroll
                    for (u32 t = 0; t < 4; t++) {
                        float a = *(const float*)(at + w * 512 + t * 128 + (low >> (8 * t) & 255u));
                        float b = *(const float*)(at + w * 512 + t * 128 + 64 + (high >> (8 * t) & 255u));
                        if (PRODUCT) sums[t % 2] += a * b;
                        else sums[t % 2] += a + b;
                    }
                }
                score += gain * (sums[0] + sums[1]) + (bias + range.shift);
            }
            u32 of_row = MEAN_SCORE ? 0 : h;
            put(level_of(score * (1.0f / heads), range), token, is_contested(p, row, token), scores + of_row * stride, counts + of_row * BINS);
        }
    }
    __syncthreads();
    flush(p, (u64)(block_row * KV_HEADS + kv_head) * SCORE_ROWS, counts, SCORE_ROWS);
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
