// Soft collisions of 8-bit codes as products of halves, for four heads at once. A digit's 16 entries of four halves are 128
// bytes: whichever entries the lanes want, each of the 32 banks is asked for one word.
#pragma once
#include "score_levels.cuh"

// One instruction where the compiler's own choice is two.
__device__ __forceinline__ u32 byte_of(u32 word, u32 byte) {
    u32 value;
    asm("prmt.b32 %0, %1, 0, %2;" : "=r"(value) : "r"(word), "r"(0x4440u | byte));
    return value;
}

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
