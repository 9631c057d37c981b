// Levels of the keys of a span for the query heads of a kv head, by a block of THREADS threads, for the scorings that
// have a way of their own (FAST). What becomes of a level is the business of `put`; `index` gives where the index
// of a token is.
#pragma once
#include "scoring.cuh"

// One instruction where the compiler's own choice is two.
__device__ __forceinline__ u32 byte_of(u32 word, u32 byte) {
    u32 value;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(value) : "r"(word), "r"(0x4440u | byte));
    return value;
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

// EARLY: the next key's words are on their way while one is scored.
template <bool EARLY, class Index, class Put>
__device__ __forceinline__ void score_keys(const Call& p, const Row& row, u32 kv_head, u64 table_row, u32 block, u32 first,
                                           u32 end, const void* lookup, Index index, Put put) {
    Range ranges[4];
    for (u32 h = 0; h < 4; h++)
        ranges[h] = range_of(p, row, kv_head, table_row + min_u32(block * 4 + h, SCORING_HEADS - 1), threadIdx.x & 31);
    u32 token = first + threadIdx.x;
    Key key, next;
    if (EARLY && token < end) load_key(next, index(token));
    for (; token < end; token += THREADS) {
        if (EARLY) {
            key = next;
            if (token + THREADS < end) load_key(next, index(token + THREADS));
        } else {
            load_key(key, index(token));
        }
        float sums[4] = {};
#pragma unroll
        for (u32 w = 0; w < WORDS; w++) {
            // Byte offsets of the two digits of all four codes.
            u32 low = key.words[w] << 3 & 0x78787878u, high = key.words[w] >> 1 & 0x78787878u;
            // Four products are added in halves: six roundings at most, see RELATIVE_ERROR.
            u32 x = 0, y = 0;
#pragma unroll
            for (u32 t = 0; t < 4; t++) {
                const u8* at = (const u8*)lookup + (w * 4 + t) * 256;
                Pair a = *(const Pair*)(at + byte_of(low, t)), b = *(const Pair*)(at + 128 + byte_of(high, t));
                x = t == 0 ? half_mul(a.low, b.low) : half_fma(a.low, b.low, x);
                y = t == 0 ? half_mul(a.high, b.high) : half_fma(a.high, b.high, y);
            }
            sums[0] += widen<DTYPE_F16>(x & 0xffffu);
            sums[1] += widen<DTYPE_F16>(x >> 16);
            sums[2] += widen<DTYPE_F16>(y & 0xffffu);
            sums[3] += widen<DTYPE_F16>(y >> 16);
        }
#pragma unroll
        for (u32 h = 0; h < 4; h++)
            if (block * 4 + h < SCORING_HEADS) put(block * 4 + h, token, level_of(key.gain * sums[h], ranges[h]));
    }
}
#elif FAST == 2
// Sums over sign bits as products of bytes on the matrix unit: bits are 0 or 1, projections are two digits of a fixed
// point number, in two columns of b each. A lane holds the sums of one head for four neighbouring keys.
#define HEAD_BLOCKS ((SCORING_HEADS + 3) / 4)
#define WORD_BLOCKS ((WORDS + 3) / 4)
#define LOOKUP_BYTES (HEAD_BLOCKS * WORD_BLOCKS * 256 * 4)
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
        for (u32 i = lane; i < BITS; i += 32) sum += rintf(u[i] * inverse);
        sum = warp_sum(sum);
        if (lane == 0) scales[h] = Scales{largest * (1.0f / 16256.0f), sum, inverse};
    }
    __syncthreads();
    // Fragment of b, per (head block, word block, step, half, lane): bytes 16·half + 4·(lane % 4) + i of column lane / 4
    // stand for bit step + 4·half + 8·i of word lane % 4 of the four.
    for (u32 at = threadIdx.x; at < HEAD_BLOCKS * WORD_BLOCKS * 256; at += THREADS) {
        u32 lane_of = at % 32, half = at / 32 % 2, step = at / 64 % 4, word = at / 256 % WORD_BLOCKS * 4 + lane_of % 4;
        u32 column = lane_of / 4, head = at / (256 * WORD_BLOCKS) * 4 + column / 2;
        u32 bytes = 0;
        if (head < SCORING_HEADS) {
            const float* u = p.tables + (table_row + head) * TABLE_ROW + AT_PROJECTIONS;
            float inverse = scales[head].inverse;
            for (u32 i = 0; i < 4; i++) {
                u32 bit = step + 4 * half + 8 * i;
                u32 table = word * TABLES_PER_WORD + bit / PLANES;
                if (bit / PLANES < TABLES_PER_WORD && table < TABLES) {
                    int value = (int)rintf(u[table * PLANES + PLANES - 1 - bit % PLANES] * inverse);
                    int high = (value + 64) >> 7;
                    int digit = column % 2 == 0 ? high : value - high * 128;
                    bytes |= (u32)(digit & 255) << (8 * i);
                }
            }
        }
        fragments[at] = bytes;
    }
}

// For four heads from the `block`-th four on. EARLY: so many loads of 32 keys are on their way.
template <u32 EARLY, class Index, class Put>
__device__ __forceinline__ void score_keys(const Call& p, const Row& row, u32 kv_head, u64 table_row, u32 block, u32 first,
                                           u32 end, const void* lookup, const Scales* scales, Index index, Put put) {
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 head = block * 4 + lane % 4;
    bool mine = head < SCORING_HEADS;
    Range range = range_of(p, row, kv_head, table_row + min_u32(block * 4, SCORING_HEADS - 1), lane);
#pragma unroll
    for (u32 h = 1; h < 4; h++) {
        if (block * 4 + h >= SCORING_HEADS) break;
        Range other = range_of(p, row, kv_head, table_row + block * 4 + h, lane);
        if (lane % 4 == h) range = other;
    }
    const u32* fragments = (const u32*)lookup + block * WORD_BLOCKS * 256 + lane;
    // What a sum counts for, and what no bit at all does.
    float unit = 2.0f * scales[head].unit, offset = scales[head].offset * scales[head].unit;
    // Few fragments stay in registers.
    const bool near = WORD_BLOCKS == 1;
    u32 b[near ? 8 : 1];
#pragma unroll
    for (u32 i = 0; near && i < 8; i++) b[i] = fragments[i * 32];
    Keys ring[EARLY];
    u32 base = first + warp * 32;
#pragma unroll
    for (u32 i = 0; i < EARLY; i++)
        if (base + i * THREADS < end) load_keys(ring[i], index(base + i * THREADS));
    for (; base < end; base += EARLY * THREADS)
#pragma unroll
        for (u32 i = 0; i < EARLY; i++) {
            u32 at = base + i * THREADS, later = at + EARLY * THREADS;
            if (at >= end) break;
            Keys keys = ring[i];
            if (later < end) load_keys(ring[i], index(later));
            int sums[2][4] = {};
#pragma unroll
            for (u32 block_of = 0; block_of < WORD_BLOCKS; block_of++) {
                uint4 words = keys.words[block_of];
                u32 of[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
                for (u32 step = 0; step < 4; step++) {
                    const u32* from = fragments + (block_of * 4 + step) * 64;
                    u32 b0 = near ? b[step * 2] : from[0], b1 = near ? b[step * 2 + 1] : from[32];
#pragma unroll
                    for (u32 t = 0; t < 2; t++) {
                        u32 x = of[2 * t] >> step, y = of[2 * t + 1] >> step;
                        u32 a[4] = {x & 0x01010101u, y & 0x01010101u, x >> 4 & 0x01010101u, y >> 4 & 0x01010101u};
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
                float score = bits_float(gains[k]) * (sum * unit - offset) + range.shift;
                if (BIAS) score += bits_float(biases[k]);
                levels[k] = level_of(score, range);
            }
            if (mine) put(head, at + lane / 4 * 4, levels);
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
template <bool EARLY, class Index, class Put>
__device__ __forceinline__ void score_keys(const Call& p, const Row& row, u32 kv_head, u64 table_row, u32 h, u32 first,
                                           u32 end, const void* lookup, Index index, Put put) {
    const u32 heads = HEADS_TOGETHER;
    Range range = range_of(p, row, kv_head, table_row + h, threadIdx.x & 31);
    u32 token = first + threadIdx.x;
    Key key, next;
    if (EARLY && token < end) load_key(next, index(token));
    for (; token < end; token += THREADS) {
        if (EARLY) {
            key = next;
            if (token + THREADS < end) load_key(next, index(token + THREADS));
        } else {
            load_key(key, index(token));
        }
        float score = 0.0f;
        for (u32 m = 0; m < heads; m++) {
            u32 at = shared_address(lookup) + (h + m) * (WORDS * 512);
            float sums[2] = {0.0f, 0.0f};
#pragma unroll
            for (u32 w = 0; w < WORDS; w++) {
                // Byte offsets of the two digits of all four codes.
                u32 low = key.words[w] << 2 & 0x3c3c3c3cu, high = key.words[w] >> 2 & 0x3c3c3c3cu;
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
