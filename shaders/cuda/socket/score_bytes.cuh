// Sums over sign bits as products of bytes on the matrix unit: bits are 0 or a power of two, projections are two digits of a
// fixed point number, in two columns of b each. A lane holds the sums of one head for four neighbouring keys.
#pragma once
#include "score_levels.cuh"
#if BULK
#include "bulk.cuh"
#endif

#define HEAD_BLOCKS ((SCORING_HEADS + 3) / 4)
#define WORD_BLOCKS ((WORDS + 3) / 4)
#define LOOKUP_BYTES (HEAD_BLOCKS * WORDS * 64 * 4)
#define HEADS_TOGETHER 4

// Of 32 keys: one word of each four for four neighbours, and their scalars.
struct Keys {
    uint4 words[WORD_BLOCKS], gain, bias;
};

// The keys of a span, 32 a warp and round.
struct Source {
    const Call& p;
    u32 sequence, kv_head, end;

    // The page of a token; past the last one, its.
    __device__ __forceinline__ u64 page_at(u32 token) const { return page_of(p, sequence, min_u32(token, end - 1)); }
};

#if BULK
// One warp has a round's keys copied to shared memory, word by word, as many rounds ahead as there is room for. Copies are
// fast only where they start on whole 128 bytes, so four lanes that read four words at once meet in one bank.
#define RUN (PAGE < SCORERS ? PAGE : SCORERS)
#define WORD_STRIDE (SCORERS * 4)
#define STAGE (INDEX_WORDS * WORD_STRIDE)
#define COPIES (INDEX_WORDS * (SCORERS / RUN))

struct Feed : Source {
    Barrier *full, *empty;
    u32 stages, stage, parity;

    __device__ __forceinline__ Feed(const Source& source, u32 stages_at, Barrier (&barriers)[2][STAGES])
        : Source(source), full(barriers[0]), empty(barriers[1]), stages(stages_at), stage(0), parity(0) {
        if (threadIdx.x < STAGES) {
            barrier_init(&full[threadIdx.x], 1);
            barrier_init(&empty[threadIdx.x], SCORERS / 32);
            barriers_ready();
        }
        __syncthreads();
    }

    __device__ __forceinline__ void turn() {
        if (++stage == STAGES) {
            stage = 0;
            parity ^= 1;
        }
    }

    // Has rounds from token `base` to `upto` copied, by the warp that does that. Stages are free at first.
    __device__ __forceinline__ void copy(u32 base, u32 upto) {
        u32 lane = threadIdx.x & 31;
        u64 pages[(COPIES + 31) / 32];
        auto find = [&](u32 from) {
#pragma unroll
            for (u32 i = 0; i < (COPIES + 31) / 32; i++) pages[i] = page_at(from + (i * 32 + lane) / INDEX_WORDS * RUN);
        };
        find(base);
        for (; base < upto; base += SCORERS) {
            barrier_wait(&empty[stage], parity ^ 1);
            if (lane == 0) barrier_expect(&full[stage], INDEX_WORDS * SCORERS * 4);
            __syncwarp();
#pragma unroll
            for (u32 i = 0; i < (COPIES + 31) / 32; i++) {
                u32 at = i * 32 + lane, word = at % INDEX_WORDS, run = at / INDEX_WORDS;
                if (at >= COPIES) continue;
                const u32* from = index_word(pages[i], kv_head, word, base + run * RUN);
                copy_bulk(stages + stage * STAGE + word * WORD_STRIDE + run * (RUN * 4), (u64)from, RUN * 4, &full[stage]);
            }
            // Asked for a round before they are needed.
            find(base + SCORERS);
            turn();
        }
    }

    __device__ __forceinline__ Keys take(u32) {
        u32 lane = threadIdx.x & 31;
        Keys keys;
        u32 at = stages + stage * STAGE + (threadIdx.x / 32 * 32 + lane / 4 * 4) * 4;
        barrier_wait(&full[stage], parity);
#pragma unroll
        for (u32 b = 0; b < WORD_BLOCKS; b++) {
            u32 word = b * 4 + lane % 4;
            keys.words[b] = uint4{0, 0, 0, 0};
            if (WORDS % 4 == 0 || word < WORDS) keys.words[b] = load_four(at + word * WORD_STRIDE);
        }
        keys.gain = load_four(at + WORDS * WORD_STRIDE);
        if (BIAS) keys.bias = load_four(at + (INDEX_WORDS - 1) * WORD_STRIDE);
        __syncwarp();
        if (lane == 0) barrier_arrive(&empty[stage]);
        turn();
        return keys;
    }
};
#else
// The next keys are on their way to registers while the ones before are scored.
struct Feed : Source {
    Keys next;
    u64 page;
    // Pages are asked for a round before they are needed; where each query head has keys of its own, loads that come earlier made
    // each take longer (1M keys of 32 heads: 730 us a step in place of 564).
    static const bool AHEAD = GROUP > 1;

    __device__ __forceinline__ explicit Feed(const Source& source) : Source(source) {}

    __device__ __forceinline__ void load(u32 base, u64 from) {
        u32 lane = threadIdx.x & 31;
        const u32* index = index_word(from, kv_head, 0, base) + lane / 4 * 4;
#pragma unroll
        for (u32 b = 0; b < WORD_BLOCKS; b++) {
            u32 word = b * 4 + lane % 4;
            next.words[b] = uint4{0, 0, 0, 0};
            if (WORDS % 4 == 0 || word < WORDS) next.words[b] = __ldg((const uint4*)&index[word * PAGE]);
        }
        next.gain = __ldg((const uint4*)&index[WORDS * PAGE]);
        if (BIAS) next.bias = __ldg((const uint4*)&index[(INDEX_WORDS - 1) * PAGE]);
    }

    __device__ __forceinline__ void start(u32 base) {
        if (base < end) load(base, page_at(base));
        page = AHEAD ? page_at(base + SCORERS) : 0;
    }

    __device__ __forceinline__ Keys take(u32 base) {
        Keys keys = next;
        if (base + SCORERS < end) load(base + SCORERS, AHEAD ? page : page_at(base + SCORERS));
        if (AHEAD) page = page_at(base + 2 * SCORERS);
        return keys;
    }
};
#endif

// The bit of its word that a plane is. A bit counts for a power of two by its place in half a byte, and projections are
// divided by it.
__device__ __forceinline__ u32 bit_of(u32 plane) {
    return plane / PLANES % TABLES_PER_WORD * PLANES + PLANES - 1 - plane % PLANES;
}

struct Scales {
    float unit, offset, inverse;
};

// Projections in fixed point of all heads, and their scales; with barriers.
__device__ __forceinline__ void fill_lookup(const Call& p, u64 table_row, void* memory, Scales* scales) {
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32* fragments = (u32*)memory;
    for (u32 h = warp; h < HEAD_BLOCKS * 4; h += THREADS / 32) {
        float largest = 0.0f, sum = 0.0f;
        const float* u = p.tables + (table_row + min_u32(h, SCORING_HEADS - 1)) * TABLE_ROW + AT_PROJECTIONS;
        for (u32 i = lane; i < BITS; i += 32) largest = fmaxf(largest, fabsf(u[i]));
        for (u32 step = 16; step > 0; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
        float inverse = largest > 0.0f ? 16256.0f / largest : 0.0f;
        for (u32 i = lane; i < BITS; i += 32) {
            float power = (float)(1u << (bit_of(i) & 3u));
            sum += rintf(u[i] * inverse / power) * power;
        }
        sum = warp_sum(sum);
        if (lane == 0) scales[h] = Scales{largest * (1.0f / 16256.0f), sum, inverse};
    }
    __syncthreads();
    // Fragment of b, per (head block, word block, step, half, column, word of the four): bytes 16·half + 4·word + i of the
    // column stand for bit step + 4·half + 8·i of the word.
    for (u32 at = threadIdx.x; at < HEAD_BLOCKS * WORDS * 64; at += THREADS) {
        u32 in_block = at % (WORDS * 64), word_block = in_block / 256, in_words = in_block % 256;
        u32 words = min_u32(4, WORDS - word_block * 4), word = word_block * 4 + in_words % words;
        u32 column = in_words / words % 8, half = in_words / (words * 8) % 2, step = in_words / (words * 16);
        u32 head = at / (WORDS * 64) * 4 + column / 2;
        u32 bytes = 0;
        if (head < SCORING_HEADS) {
            const float* u = p.tables + (table_row + head) * TABLE_ROW + AT_PROJECTIONS;
            float inverse = scales[head].inverse;
            for (u32 i = 0; i < 4; i++) {
                u32 bit = step + 4 * half + 8 * i;
                u32 table = word * TABLES_PER_WORD + bit / PLANES;
                if (bit / PLANES < TABLES_PER_WORD && table < TABLES) {
                    int value = (int)rintf(u[table * PLANES + PLANES - 1 - bit % PLANES] * inverse / (float)(1u << step));
                    int high = (value + 64) >> 7;
                    int digit = column % 2 == 0 ? high : value - high * 128;
                    bytes |= (u32)(digit & 255) << (8 * i);
                }
            }
        }
        fragments[at] = bytes;
    }
}

// Where the scores of the lane's own head are, and its counts.
struct Put {
    const Call& p;
    const Row& row;
    u32 end;
    u64 scores_at;
    u32 counts_at;

    // Of four neighbouring tokens; where all 32 of the warp are contested keys of the span, they need no look each.
    __device__ __forceinline__ void operator()(u32 token, const u32 (&levels)[4]) const {
        u32 base = token & ~31u;
        bool all = base + 32 <= end;
#if DISJOINT
        all = all && base >= p.sink && base + 32 + p.window <= row.visible;
#endif
        // Rows are padded to whole 64 scores, so that the last ones may be written whole.
        if (all || token < end) *(uint2*)&p.scores[scores_at + token] = uint2{levels[0] | levels[1] << 16, levels[2] | levels[3] << 16};
        if (all) {
#pragma unroll
            for (u32 i = 0; i < 4; i++) atomicAdd(&memory[counts_at + (levels[i] >> BIN_SHIFT)], 1u);
            return;
        }
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (token + i < end && is_contested(p, row, token + i)) atomicAdd(&memory[counts_at + (levels[i] >> BIN_SHIFT)], 1u);
    }
};

// For four heads from the `block`-th four on.
__device__ __forceinline__ void score_keys(const Call& p, const Row& row, u32 kv_head, u64 table_row, u32 block, u32 first,
                                           const Scales* scales, Feed& feed, const Put& put) {
    u32 lane = threadIdx.x & 31, base = first + threadIdx.x / 32 * 32;
    u32 head = block * 4 + lane % 4;
    bool mine = head < SCORING_HEADS;
    Range range = range_of(p, row, kv_head, table_row + min_u32(block * 4, SCORING_HEADS - 1), lane);
#pragma unroll
    for (u32 h = 1; h < 4; h++) {
        if (block * 4 + h >= SCORING_HEADS) break;
        Range other = range_of(p, row, kv_head, table_row + block * 4 + h, lane);
        if (lane % 4 == h) range = other;
    }
    const u32* fragments = memory + block * WORDS * 64;
    auto fragment = [&](u32 word_block, u32 of_step) {
        u32 words = min_u32(4, WORDS - word_block * 4);
        bool inside = WORDS % 4 == 0 || lane % 4 < words;
        return inside ? fragments[word_block * 256 + (of_step * 8 + lane / 4) * words + lane % 4] : 0;
    };
    // In levels: what a sum counts for, what no bit at all does, and a key without gain; see level_of.
    float unit = 2.0f * scales[head].unit * range.inverse_width;
    float offset = scales[head].offset * scales[head].unit * range.inverse_width;
    float least = (range.shift - range.low) * range.inverse_width + 1.0f;
    // Few fragments stay in registers.
    const bool near = WORD_BLOCKS == 1;
    u32 b[near ? 8 : 1];
#pragma unroll
    for (u32 i = 0; near && i < 8; i++) b[i] = fragment(0, i);
    // A warp takes its part of each round, whether or not there are keys in it.
    for (; first < feed.end; first += SCORERS, base += SCORERS) {
        Keys keys = feed.take(base);
        if (base >= feed.end) continue;
        int sums[2][4] = {};
#pragma unroll
        for (u32 block_of = 0; block_of < WORD_BLOCKS; block_of++) {
            uint4 words = keys.words[block_of];
            // Bits stay where they are in their half of a byte: one instruction each.
            u32 low[4] = {words.x, words.y, words.z, words.w};
            u32 high[4] = {words.x >> 4, words.y >> 4, words.z >> 4, words.w >> 4};
#pragma unroll
            for (u32 step = 0; step < 4; step++) {
                u32 b0 = near ? b[step * 2] : fragment(block_of, step * 2);
                u32 b1 = near ? b[step * 2 + 1] : fragment(block_of, step * 2 + 1);
#pragma unroll
                for (u32 t = 0; t < 2; t++) {
                    const u32 mask = 0x01010101u << step;
                    u32 a[4] = {low[2 * t] & mask, low[2 * t + 1] & mask, high[2 * t] & mask, high[2 * t + 1] & mask};
                    mma_bytes(sums[t], a, b0, b1);
                }
            }
        }
        u32 gains[4] = {keys.gain.x, keys.gain.y, keys.gain.z, keys.gain.w};
        u32 biases[4] = {keys.bias.x, keys.bias.y, keys.bias.z, keys.bias.w};
        u32 levels[4];
#pragma unroll
        for (u32 k = 0; k < 4; k++) {
            float sum = (float)(128 * sums[k / 2][k % 2 * 2] + sums[k / 2][k % 2 * 2 + 1]);
            float level = bits_float(gains[k]) * (sum * unit - offset) + least;
            if (BIAS) level += bits_float(biases[k]) * range.inverse_width;
            // NaN and what is negative become zero.
            levels[k] = min_u32((u32)level, LEVELS + 1);
        }
        if (mine) put(base + lane / 4 * 4, levels);
    }
}

__device__ __forceinline__ void score_span(const Call& p, const Row& row, u32 kv_head, u32 block_row) {
    __shared__ Scales scales[HEAD_BLOCKS * 4];
    u32* counts = memory + LOOKUP_BYTES / 4;
    u64 table_row = (u64)(block_row * KV_HEADS + kv_head) * SCORING_HEADS;
    u64 score_row = (u64)(block_row * KV_HEADS + kv_head) * SCORE_ROWS;
    u32 first = blockIdx.x * p.span;
    u32 end = min_u32(row.visible, first + p.span);
    u32 stride = (row.visible + 63) / 64 * 64;
    u64 scores = (u64)row.score_base * 64 + (u64)(kv_head * SCORE_ROWS) * stride;
    const Source source = {p, row.sequence, kv_head, end};
#if BULK
    __shared__ Barrier barriers[2][STAGES];
    Feed feed(source, shared_address(memory + LOOKUP_BYTES / 4 + min_u32(4, SCORE_ROWS) * BINS), barriers);
    const bool copies = threadIdx.x >= SCORERS;
    const u32 ahead = min_u32(end, first + STAGES * SCORERS);
#else
    Feed feed(source);
#endif
    for (u32 block = 0; block < HEAD_BLOCKS; block++) {
        u32 first_head = block * HEADS_TOGETHER, heads = min_u32(HEADS_TOGETHER, SCORE_ROWS - first_head);
        // The first keys are on their way while the query is hashed.
#if BULK
        if (copies) feed.copy(first, ahead);
#else
        feed.start(first + threadIdx.x / 32 * 32);
#endif
        __syncthreads();
        for (u32 i = threadIdx.x; i < heads * BINS; i += THREADS) counts[i] = 0;
        if (block == 0) {
            begin();
            fill_lookup(p, table_row, memory, scales);
        }
        __syncthreads();
        u32 own = min_u32(threadIdx.x % 4, heads - 1);
        u64 scores_at = scores + (u64)(first_head + own) * stride;
        u32 counts_at = LOOKUP_BYTES / 4 + own * BINS;
        // Not to be worked out anew for each key.
        asm volatile("" : "+l"(scores_at), "+r"(counts_at));
#if BULK
        if (copies) feed.copy(ahead, end);
        else
#endif
            score_keys(p, row, kv_head, table_row, block, first, scales, feed, Put{p, row, end, scores_at, counts_at});
        __syncthreads();
        flush(p, score_row + first_head, counts, heads);
    }
}
