// Sign bits and scalars of many stored keys: one block per (64 tokens, kv head, item). The projections are a tiled
// product in f32, 64 tokens by 64 planes at a time; a thread holds 4 by 4 of them.
#include "scoring.cuh"

#define THREADS 256
#define TOKENS 64
#define SLICE 16
// Whole words of codes per block of 64 planes.
#define BLOCK_WORDS (64 / (TABLES_PER_WORD * PLANES))
#define BLOCK_PLANES (BLOCK_WORDS * TABLES_PER_WORD * PLANES)
#define BLOCKS ((WORDS + BLOCK_WORDS - 1) / BLOCK_WORDS)

extern "C" __global__ void __launch_bounds__(THREADS) hash_keys(ARGUMENTS) {
    CALL;
    __shared__ float keys[SLICE][TOKENS + 4];
    __shared__ float weights[SLICE][64 + 4];
    __shared__ u32 words[BLOCK_WORDS][TOKENS];
    __shared__ float sums[16][TOKENS];
    Item item = p.items[blockIdx.z];
    u32 head = blockIdx.y;
    u32 first = item.hash_start / TOKENS * TOKENS + blockIdx.x * TOKENS;
    wait_for_earlier();
    if (first >= item.hash_end) return;
    u64 page = page_of(p, item.sequence, first);
    const float* planes = p.planes + (p.planes_stride > 0 ? (u64)head * p.planes_stride : 0);
    u32 token4 = threadIdx.x % 16 * 4, plane4 = threadIdx.x / 16 * 4;
    float projection_sums[4] = {}, key_squares[4] = {};
    for (u32 block = 0; block < BLOCKS; block++) {
        float u[4][4] = {};
        for (u32 slice = 0; slice < HEAD_DIM; slice += SLICE) {
            __syncthreads();
            for (u32 i = threadIdx.x; i < SLICE * TOKENS; i += THREADS) {
                // Channels innermost for keys, planes for weights: as they are stored.
                u32 channel = slice + i % SLICE, token = i / SLICE;
                float x = 0.0f;
                if (channel < HEAD_DIM) {
                    x = stored(key_row(page, head, first + token), channel);
#if CENTER
                    x -= bits_float(p.state[(u64)item.slot * SLOT_WORDS + head * HEAD_DIM + channel]);
#endif
                }
                keys[i % SLICE][token] = x;
                u32 column = i % 64, plane = block * BLOCK_PLANES + column, row = slice + i / 64;
                bool inside = column < BLOCK_PLANES && plane < BITS && row < HEAD_DIM;
                weights[i / 64][column] = inside ? __ldg(&planes[(u64)row * BITS + plane]) : 0.0f;
            }
            __syncthreads();
#pragma unroll
            for (u32 c = 0; c < SLICE; c++) {
                float4 x = *(const float4*)&keys[c][token4], w = *(const float4*)&weights[c][plane4];
                float xs[4] = {x.x, x.y, x.z, x.w}, ws[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
#pragma unroll
                    for (u32 j = 0; j < 4; j++) u[j][i] += xs[i] * ws[j];
                    if (block == 0 && plane4 == 0) key_squares[i] += xs[i] * xs[i];
                }
            }
        }
        for (u32 i = threadIdx.x; i < BLOCK_WORDS * TOKENS; i += THREADS) words[i / TOKENS][i % TOKENS] = 0;
        __syncthreads();
#pragma unroll
        for (u32 j = 0; j < 4; j++) {
            u32 column = plane4 + j, plane = block * BLOCK_PLANES + column;
            if (column < BLOCK_PLANES && plane < BITS) {
                u32 table = plane / PLANES;
                u32 bit = table % TABLES_PER_WORD * PLANES + PLANES - 1 - plane % PLANES;
#pragma unroll
                for (u32 i = 0; i < 4; i++) {
                    projection_sums[i] += fabsf(u[j][i]);
                    if (u[j][i] >= 0.0f) atomicOr(&words[table / TABLES_PER_WORD - block * BLOCK_WORDS][token4 + i], 1u << bit);
                }
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < BLOCK_WORDS * TOKENS; i += THREADS) {
            u32 token = first + i % TOKENS, word = block * BLOCK_WORDS + i / TOKENS;
            if (token >= item.hash_start && token < item.hash_end && word < WORDS)
                *index_word(page, head, word, token) = words[i / TOKENS][i % TOKENS];
        }
    }
#if GAIN
    // Sums over the 16 groups of planes, in a fixed order.
#pragma unroll
    for (u32 i = 0; i < 4; i++) sums[threadIdx.x / 16][token4 + i] = projection_sums[i];
    __syncthreads();
    if (plane4 == 0) {
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 token = first + token4 + i;
            float total = 0.0f, square = 0.0f;
            for (u32 g = 0; g < 16; g++) total += sums[g][token4 + i];
            if (token < item.hash_start || token >= item.hash_end) continue;
#if VALUE_NORM
            u64 value = value_row(page, head, token);
            for (u32 c = 0; c < VALUE_DIM; c++) {
                float x = stored(value, c);
                square += x * x;
            }
#endif
            float value_norm = sqrtf(square);
            float gain = key_gain(value_norm, key_squares[i], total);
            *index_word(page, head, WORDS, token) = float_bits(gain);
            atomicMax(&p.state[(u64)item.slot * SLOT_WORDS + MEAN_WORDS + head], float_bits(gain));
#if BIAS
            *index_word(page, head, WORDS + 1, token) = float_bits(key_bias(value_norm));
#endif
        }
    }
#endif
}
