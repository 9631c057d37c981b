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

extern __shared__ __align__(256) u32 memory[];

// One instruction where the compiler's own choice is two.
__device__ __forceinline__ u32 byte_of(u32 word, u32 byte) {
    u32 value;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(value) : "r"(word), "r"(0x4440u | byte));
    return value;
}

// Brings the index of a key nearer.
__device__ __forceinline__ void prefetch_key(const u32* index) {
#pragma unroll
    for (u32 w = 0; w < INDEX_WORDS; w++) asm volatile("prefetch.global.L2 [%0];" ::"l"(index + w * PAGE));
}

#if FAST == 1
// Products of halves for four heads at once. A digit's 16 entries of four halves are 128 bytes: whichever entries the
// lanes want, each of the 32 banks is asked for one word.
#define LOOKUP_BYTES ((TABLES + 3) / 4 * 4 * 2 * 16 * 8)
#define HEADS_TOGETHER 4

struct __align__(8) Pair {
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

struct Key {
    u32 words[WORDS];
    float gain;
};

__device__ __forceinline__ void load_key(Key& key, const u32* index) {
#pragma unroll
    for (u32 w = 0; w < WORDS; w++) key.words[w] = __ldg(&index[w * PAGE]);
    key.gain = GAIN ? bits_float(__ldg(&index[WORDS * PAGE])) : 1.0f;
}

// Look-ups of four heads from the `block`-th four on; barriers are the caller's.
__device__ __forceinline__ void fill_lookup(const Call& p, u64 table_row, u32 block, void* memory) {
    Pair* lookup = (Pair*)memory;
    for (u32 i = threadIdx.x; i < LOOKUP_BYTES / 8; i += THREADS) {
        float entry[4];
        for (u32 h = 0; h < 4; h++) {
            bool inside = block * 4 + h < SCORING_HEADS && i < ENTRIES;
            entry[h] = inside ? p.tables[(table_row + block * 4 + h) * TABLE_ROW + i] : 0.0f;
        }
        lookup[i] = Pair{pack_pair<DTYPE_F16>(entry[0], entry[1]), pack_pair<DTYPE_F16>(entry[2], entry[3])};
    }
}

template <class Index, class Ready, class Put>
__device__ __forceinline__ void score_keys(const Call& p, const Row& row, u32 kv_head, u64 table_row, u32 block, u32 first,
                                           u32 end, const void* lookup, Index index, Ready ready, Put put) {
    u32 token = first + threadIdx.x;
    if (token < end) prefetch_key(index(token));
    ready();
    // Soft collisions are never negative and have no shift: levels start at zero.
    float scales[4];
#pragma unroll
    for (u32 h = 0; h < 4; h++) {
        u32 head = min_u32(block * 4 + h, SCORING_HEADS - 1);
        scales[h] = range_of(p, row, kv_head, table_row + head, threadIdx.x & 31).inverse_width;
    }
    for (; token < end; token += THREADS) {
        Key key;
        load_key(key, index(token));
        float sums[4] = {};
#pragma unroll
        for (u32 w = 0; w < WORDS; w++) {
            // Byte offsets of the two digits of all four codes.
            u32 low = key.words[w] << 3 & 0x78787878u, high = key.words[w] >> 1 & 0x78787878u;
#pragma unroll
            for (u32 t = 0; t < 4; t += 2) {
                const u8* at = (const u8*)lookup + (w * 4 + t) * 256;
                Pair a0 = *(const Pair*)(at + byte_of(low, t)), b0 = *(const Pair*)(at + 128 + byte_of(high, t));
                Pair a1 = *(const Pair*)(at + 256 + byte_of(low, t + 1)), b1 = *(const Pair*)(at + 384 + byte_of(high, t + 1));
                // More sums of halves would cost more in candidates than they save here.
                u32 x = half_fma(a1.low, b1.low, half_mul(a0.low, b0.low));
                u32 y = half_fma(a1.high, b1.high, half_mul(a0.high, b0.high));
                sums[0] += widen<DTYPE_F16>(x & 0xffffu);
                sums[1] += widen<DTYPE_F16>(x >> 16);
                sums[2] += widen<DTYPE_F16>(y & 0xffffu);
                sums[3] += widen<DTYPE_F16>(y >> 16);
            }
        }
#pragma unroll
        for (u32 h = 0; h < 4; h++)
            if (block * 4 + h < SCORING_HEADS)
                put(block * 4 + h, token, min_u32((u32)(key.gain * scales[h] * sums[h] + 1.0f), LEVELS + 1));
    }
}
#elif FAST == 2
// Sums over sign bits as products of bytes on the matrix unit: bits are 0 or a power of two, projections are two digits of a fixed
// point number, in two columns of b each. A lane holds the sums of one head for four neighbouring keys.
#define HEAD_BLOCKS ((SCORING_HEADS + 3) / 4)
#define WORD_BLOCKS ((WORDS + 3) / 4)
#define LOOKUP_BYTES (HEAD_BLOCKS * WORDS * 64 * 4)
#define HEADS_TOGETHER 4

// Of 32 keys: one word of each four for four neighbours, and their scalars.
struct Keys {
    uint4 words[WORD_BLOCKS], gain, bias;
};

__device__ __forceinline__ void load_keys(Keys& keys, const u32* index) {
    u32 lane = threadIdx.x & 31;
    index += lane / 4 * 4;
#pragma unroll
    for (u32 b = 0; b < WORD_BLOCKS; b++) {
        u32 word = b * 4 + lane % 4;
        keys.words[b] = uint4{0, 0, 0, 0};
        if (WORDS % 4 == 0 || word < WORDS) keys.words[b] = __ldg((const uint4*)&index[word * PAGE]);
    }
    keys.gain = __ldg((const uint4*)&index[WORDS * PAGE]);
    if (BIAS) keys.bias = __ldg((const uint4*)&index[(INDEX_WORDS - 1) * PAGE]);
}

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

// For four heads from the `block`-th four on.
template <class Page, class Ready, class Put>
__device__ __forceinline__ void score_keys(const Call& p, const Row& row, u32 kv_head, u64 table_row, u32 block, u32 first,
                                           u32 end, const void* lookup, const Scales* scales, Page page_at, Ready ready, Put put) {
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Keys next;
    u32 base = first + warp * 32;
    if (base < end) load_keys(next, index_word(page_at(base), kv_head, 0, base));
    // Asked for a round before it is needed; where each query head has keys of its own, loads that come earlier made each take
    // longer (1M keys of 32 heads: 730 us a step in place of 564).
    const bool ahead = GROUP > 1;
    u64 page = ahead ? page_at(base + THREADS) : 0;
    ready();
    u32 head = block * 4 + lane % 4;
    bool mine = head < SCORING_HEADS;
    Range range = range_of(p, row, kv_head, table_row + min_u32(block * 4, SCORING_HEADS - 1), lane);
#pragma unroll
    for (u32 h = 1; h < 4; h++) {
        if (block * 4 + h >= SCORING_HEADS) break;
        Range other = range_of(p, row, kv_head, table_row + block * 4 + h, lane);
        if (lane % 4 == h) range = other;
    }
    const u32* fragments = (const u32*)lookup + block * WORDS * 64;
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
    for (; base < end; base += THREADS) {
        Keys keys = next;
        // The next keys are on their way while these are scored.
        if (base + THREADS < end) load_keys(next, index_word(ahead ? page : page_at(base + THREADS), kv_head, 0, base + THREADS));
        if (ahead) page = page_at(base + 2 * THREADS);
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
#elif FAST == 3
// Look-ups of 8-bit codes in f32, one head at a time: an entry's place is cut out of the word as a byte, into the address
// of tables that start on whole 256 bytes.
__device__ __forceinline__ u32 address_of(u32 tables, u32 word, u32 byte) {
    u32 address;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(address) : "r"(word), "r"(tables), "r"(0x7650u | byte));
    return address;
}
template <u32 OFFSET> __device__ __forceinline__ float entry_at(u32 address) {
    float entry;
    asm volatile("ld.shared.f32 %0, [%1 + %2];" : "=f"(entry) : "r"(address), "n"(OFFSET));
    return entry;
}
#define LOOKUP_BYTES (SCORING_HEADS * WORDS * 512)
#define HEADS_TOGETHER (MEAN_SCORE ? SCORING_HEADS : 1)

struct Key {
    u32 words[WORDS];
    float gain, bias;
};

__device__ __forceinline__ void load_key(Key& key, const u32* index) {
#pragma unroll
    for (u32 w = 0; w < WORDS; w++) key.words[w] = __ldg(&index[w * PAGE]);
    key.gain = GAIN ? bits_float(__ldg(&index[WORDS * PAGE])) : 1.0f;
    key.bias = BIAS ? bits_float(__ldg(&index[(WORDS + 1) * PAGE])) : 0.0f;
}

__device__ __forceinline__ void fill_lookup(const Call& p, u64 table_row, void* memory) {
    const u32 entries = WORDS * 4 * 32;
    float* lookup = (float*)memory;
    for (u32 i = threadIdx.x; i < SCORING_HEADS * entries; i += THREADS) {
        bool inside = i % entries < ENTRIES;
        lookup[i] = inside ? p.tables[(table_row + i / entries) * TABLE_ROW + i % entries] : 0.0f;
    }
}

// For head `h`, or for the mean of all.
template <class Index, class Ready, class Put>
__device__ __forceinline__ void score_keys(const Call& p, const Row& row, u32 kv_head, u64 table_row, u32 h, u32 first,
                                           u32 end, const void* lookup, Index index, Ready ready, Put put) {
    const u32 heads = HEADS_TOGETHER;
    u32 token = first + threadIdx.x;
    if (token < end) prefetch_key(index(token));
    ready();
    Range range = range_of(p, row, kv_head, table_row + h, threadIdx.x & 31);
    for (; token < end; token += THREADS) {
        Key key;
        load_key(key, index(token));
        float score = 0.0f;
        for (u32 m = 0; m < heads; m++) {
            u32 at = shared_address(lookup) + (h + m) * (WORDS * 512);
            float sums[2] = {0.0f, 0.0f};
#pragma unroll
            for (u32 w = 0; w < WORDS; w++) {
                // Byte offsets of the two digits of all four codes.
                u32 word = key.words[w];
                // Not kept from one head to the next: registers are dearer.
                if (heads > 1) asm volatile("" : "+r"(word));
                u32 low = word << 2 & 0x3c3c3c3cu, high = word >> 2 & 0x3c3c3c3cu;
                u32 tables = at + w * 512;
                float a0 = entry_at<0>(address_of(tables, low, 0)), b0 = entry_at<64>(address_of(tables, high, 0));
                float a1 = entry_at<128>(address_of(tables, low, 1)), b1 = entry_at<192>(address_of(tables, high, 1));
                float a2 = entry_at<256>(address_of(tables, low, 2)), b2 = entry_at<320>(address_of(tables, high, 2));
                float a3 = entry_at<384>(address_of(tables, low, 3)), b3 = entry_at<448>(address_of(tables, high, 3));
                if (PRODUCT) {
                    sums[0] += a0 * b0;
                    sums[1] += a1 * b1;
                    sums[0] += a2 * b2;
                    sums[1] += a3 * b3;
                } else {
                    sums[0] += (a0 + b0) + (a2 + b2);
                    sums[1] += (a1 + b1) + (a3 + b3);
                }
            }
            score += key.gain * (sums[0] + sums[1]) + (key.bias + range.shift);
        }
        put(MEAN_SCORE ? 0 : h, token, level_of(score * (1.0f / heads), range));
    }
}
#endif

// Counts a level, and stores it.
__device__ __forceinline__ void put(u32 level, u32 place, bool contested, u16* scores, u32* counts) {
    scores[place] = (u16)level;
    if (contested) atomicAdd(&counts[level >> BIN_SHIFT], 1u);
}

// Waits for the query's tables.
__device__ __forceinline__ void begin() {
    wait_for_earlier();
    let_later_start();
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
    u32 first_head, end;
#if FAST == 2
    // Where the scores of the lane's own head are, and its counts.
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
#else
    // From the first of the block's heads on.
    u16* scores;
    u32 stride;

    __device__ __forceinline__ void operator()(u32 head, u32 token, u32 level) const {
        u32 of_block = head - first_head;
        u32* counts = memory + LOOKUP_BYTES / 4 + of_block * BINS;
        bool contested = is_contested(p, row, token);
        put(level, of_block * stride + token, contested, scores, counts);
    }
#endif
};

__device__ void score_span(const Call& p, const Row& row, u32 kv_head, u32 block_row) {
    u32* counts = memory + LOOKUP_BYTES / 4;
    u64 table_row = (u64)(block_row * KV_HEADS + kv_head) * SCORING_HEADS;
    u64 score_row = (u64)(block_row * KV_HEADS + kv_head) * SCORE_ROWS;
    u32 first = blockIdx.x * p.span;
    u32 end = min_u32(row.visible, first + p.span);
    u32 stride = (row.visible + 63) / 64 * 64;
    u16* scores = p.scores + (u64)row.score_base * 64 + (u64)(kv_head * SCORE_ROWS) * stride;
#if FAST == 2
    auto page_at = [&](u32 token) { return page_of(p, row.sequence, min_u32(token, end - 1)); };
    __shared__ Scales scales[HEAD_BLOCKS * 4];
#else
    auto index = [&](u32 token) { return index_word(page_of(p, row.sequence, token), kv_head, 0, token); };
#endif
    for (u32 block = 0; block < (SCORING_HEADS + HEADS_TOGETHER - 1) / HEADS_TOGETHER; block++) {
        u32 first_head = MEAN_SCORE ? 0 : block * HEADS_TOGETHER, heads = min_u32(HEADS_TOGETHER, SCORE_ROWS - first_head);
        // The first keys are on their way while the query is hashed.
        auto ready = [&]() {
            __syncthreads();
            for (u32 i = threadIdx.x; i < heads * BINS; i += THREADS) counts[i] = 0;
            if (block == 0) begin();
#if FAST == 1
            fill_lookup(p, table_row, block, memory);
#elif FAST == 2
            if (block == 0) fill_lookup(p, table_row, memory, scales);
#else
            if (block == 0) fill_lookup(p, table_row, memory);
#endif
            __syncthreads();
        };
#if FAST == 2
        u32 own = min_u32(threadIdx.x % 4, heads - 1);
        u64 scores_at = scores - p.scores + (u64)(first_head + own) * stride;
        u32 counts_at = LOOKUP_BYTES / 4 + own * BINS;
        // Not to be worked out anew for each key.
        asm volatile("" : "+l"(scores_at), "+r"(counts_at));
        Put put_levels = {p, row, first_head, end, scores_at, counts_at};
        score_keys(p, row, kv_head, table_row, block, first, end, memory, scales, page_at, ready, put_levels);
#else
        Put put_levels = {p, row, first_head, end, scores + (u64)first_head * stride, stride};
        score_keys(p, row, kv_head, table_row, block, first, end, memory, index, ready, put_levels);
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
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_TOGETHER) score(ARGUMENTS) {
    CALL;
    Row row = p.rows[p.first_row + blockIdx.z];
    // Rows that keep every key need no scores.
    if (blockIdx.x * p.span < row.visible && row.heavy < row.visible && row.heavy > 0)
        score_span(p, row, blockIdx.y, blockIdx.z);
    else begin();
}
