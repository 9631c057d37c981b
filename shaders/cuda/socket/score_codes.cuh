// Look-ups of 8-bit codes in f32, one head at a time: an entry's place is cut out of the word as a byte, into the address
// of tables that start on whole 256 bytes.
#pragma once
#include "score_levels.cuh"

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
