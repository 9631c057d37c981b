// Attention of the query heads of one kv head over 16 keys at a time, by a warp on the matrix unit: 16-bit keys and values.
//
// Logits are a product of 16 rows of the query by 16 keys, values one of 16 rows of weights by the value rows. Numbers
// that 16 bits cannot hold are split into several that can; where there are at most 8 heads the other 8 rows carry the
// second part for free.
#pragma once
#include "partials.cuh"

// Warps that compute.
#define WARPS 4
// Whether rows follow each other in shared memory, as they do in a page, not padded to lie in different banks: matrices
// are then put together from vectors of 16 bytes, and which channel a lane works on follows from that.
#ifndef LINEAR
#define LINEAR 0
#endif
#define TILE 16
#define K_STEPS ((HEAD_DIM + 15) / 16)
#define V_STEPS ((VALUE_DIM + 15) / 16)
#define PACKED (HEADS <= 8)
#define ROWS (PACKED ? 1 : 2)
#define Q_PASSES (PACKED ? (Q_SPLITS + 1) / 2 : Q_SPLITS)
#define P_PASSES (PACKED ? (P_SPLITS + 1) / 2 : P_SPLITS)
// Floats of a warp's result, and of one head in it.
#define RESULT_HEAD (V_STEPS * 16 + 4)
#define RESULT (HEADS * RESULT_HEAD)
// Parts of a head that are read at once in the end, as registers allow.
#define TOGETHER (VALUE_DIM <= 128 ? 32 : 16)
// Large queries stay in shared memory, as each lane will want them.
#define QUERY_SHARED (Q_PASSES * K_STEPS > 8)
// Elements of a row of the query there, and of all of it.
#define QUERY_ROW (K_STEPS * 16 + 8)
#define QUERY_PARTS (Q_PASSES * 16 * QUERY_ROW)

__device__ __forceinline__ u32 word_of(const uint4& words, u32 word) {
    return word == 0 ? words.x : word == 1 ? words.y : word == 2 ? words.z : words.w;
}
// The low or the high halves of two words.
__device__ __forceinline__ u32 halves_of(u32 a, u32 b, u32 high) {
    u32 halves;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(halves) : "r"(a), "r"(b), "r"(high ? 0x7632u : 0x5410u));
    return halves;
}

// The query heads of a block.
struct Heads {
    u32 kv_head, first, count;
};

__device__ __forceinline__ Heads heads_of_block() {
    u32 first = blockIdx.y % HEAD_TILES * HEADS;
    return Heads{blockIdx.y / HEAD_TILES, first, min_u32(HEADS, GROUP - first)};
}

// What a query before the first key comes to; by all threads.
template <u32 THREADS> __device__ void store_nothing(const Call& p, u32 row_index, const Heads& heads) {
    for (u32 i = threadIdx.x; i < heads.count * VALUE_DIM; i += THREADS) {
        u64 index = (u64)row_index * Q_HEADS + heads.kv_head * GROUP + heads.first + i / VALUE_DIM;
        store_element<OUT_DTYPE>(p.o, index * VALUE_DIM + i % VALUE_DIM, 0.0f);
        if (i % VALUE_DIM == 0) store_lse(p, index, 0.0f, 0.0f);
    }
}

// The parts of the query, `[pass, row, channel]`: by few instructions, which come from memory too, one after the other.
// By all threads, with barriers.
template <u32 THREADS> __device__ __forceinline__ void split_query(const Call& p, u16* parts, u32 row_index, const Heads& heads) {
    i64 q_at = (row_index / p.tq) * p.q_strides.batch + (row_index % p.tq) * p.q_strides.token
        + (i64)(heads.kv_head * GROUP + heads.first) * p.q_strides.head;
    for (u32 i = threadIdx.x; i < QUERY_PARTS / 2; i += THREADS) ((u32*)parts)[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (u32 i = threadIdx.x; i < heads.count * HEAD_DIM; i += THREADS) {
        u32 head = i / HEAD_DIM, channel = i % HEAD_DIM;
        float x = input_element<Q_DTYPE>(p.q, q_at + head * p.q_strides.head + channel);
#pragma unroll
        for (u32 split = 0; split < Q_SPLITS; split++) {
            u32 row_of = PACKED ? split / 2 * 16 + split % 2 * 8 + head : split * 16 + head;
            parts[row_of * QUERY_ROW + channel] = (u16)narrow<KV_DTYPE>(x);
            x = rest_of(x);
        }
    }
    __syncthreads();
}

// Which heads see a key: all or none, or some by a mask.
struct All {
    bool seen;
    __device__ __forceinline__ bool has(u32 head) const { return seen; }
};
struct Some {
    u32 mask;
    __device__ __forceinline__ bool has(u32 head) const { return mask >> head & 1u; }
};

// Of a warp: rows of the query and of the result are lane / 4 and that plus 8, columns lane % 4 · 2 and on.
struct Attention {
    float scale;
    const u16* parts;
#if !QUERY_SHARED
    u32 query[Q_PASSES][K_STEPS][4];
#endif
    float values[V_STEPS * 2][4];
    float peak[ROWS], sum[ROWS];

    __device__ __forceinline__ u32 row() const { return (threadIdx.x & 31) / 4; }
    __device__ __forceinline__ u32 pair() const { return threadIdx.x % 4 * 2; }

    // The first of two channels that a lane has of the query in a step, per half of the step's 16.
    __device__ __forceinline__ u32 query_channel(u32 step, u32 half) const {
        return LINEAR ? step / 2 * 32 + pair() * 4 + step % 2 * 4 + half * 2 : step * 16 + half * 8 + pair();
    }

    // The channel that is column `pair() + i` of eight values.
    __device__ __forceinline__ u32 value_channel(u32 eight, u32 i) const {
        return LINEAR ? eight / 8 * 64 + (pair() + i) * 8 + eight % 8 : eight * 8 + pair() + i;
    }

    __device__ __forceinline__ void query_at(u32 (&a)[4], u32 pass, u32 step) const {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            a[i] = *(const u32*)&parts[(pass * 16 + row() + i % 2 * 8) * QUERY_ROW + query_channel(step, i / 2)];
    }

    __device__ __forceinline__ void begin(const Call& p, const u16* query_parts) {
        scale = p.scale * LOG2_E;
        parts = query_parts;
#if !QUERY_SHARED
#pragma unroll
        for (u32 pass = 0; pass < Q_PASSES; pass++)
#pragma unroll
            for (u32 step = 0; step < K_STEPS; step++) query_at(query[pass][step], pass, step);
#endif
#pragma unroll
        for (u32 i = 0; i < V_STEPS * 2; i++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) values[i][c] = 0.0f;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            peak[r] = MASKED;
            sum[r] = 0.0f;
        }
    }

    // Adds 16 keys. Lanes 0 to 7 point at keys 0 to 7, the next 8 at their other half, then keys 8 to 15; for values
    // lanes 0 to 15 point at the 16 rows, the others at their next 8 channels. `seen(key)` says which
    // heads see it.
    template <class Seen> __device__ __forceinline__ void add(u32 keys_at, u32 values_at, Seen seen) {
        // Two products of 8 keys each.
        float logits[2][4] = {};
#if LINEAR
        uint4 ahead[2];
#endif
#pragma unroll
        for (u32 step = 0; step < K_STEPS; step++) {
            u32 b[4];
#if LINEAR
            if (step % 2 == 0)
#pragma unroll
                for (u32 n = 0; n < 2; n++) ahead[n] = load_four(keys_at + n * 8 * HEAD_DIM * 2 + step * 32);
#pragma unroll
            for (u32 n = 0; n < 2; n++) {
                b[2 * n] = step % 2 == 0 ? ahead[n].x : ahead[n].z;
                b[2 * n + 1] = step % 2 == 0 ? ahead[n].y : ahead[n].w;
            }
#else
            load_matrices(b, keys_at + step * 32);
#endif
#pragma unroll
            for (u32 pass = 0; pass < Q_PASSES; pass++) {
#if QUERY_SHARED
                u32 a[4];
                query_at(a, pass, step);
#else
                const u32(&a)[4] = query[pass][step];
#endif
                mma16<KV_DTYPE>(logits[0], a, b[0], b[1]);
                mma16<KV_DTYPE>(logits[1], a, b[2], b[3]);
            }
        }
        // weights[r][n][i]: row, eight keys, key.
        float weights[ROWS][2][2];
#pragma unroll
        for (u32 n = 0; n < 2; n++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                auto heads = seen(n * 8 + pair() + i);
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) {
                    float logit = PACKED ? logits[n][i] + logits[n][i + 2] : logits[n][2 * r + i];
                    weights[r][n][i] = heads.has(row() + 8 * r) ? logit * scale : MASKED;
                }
            }
        bool grew = false;
        float top[ROWS];
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            float most = fmaxf(fmaxf(weights[r][0][0], weights[r][0][1]), fmaxf(weights[r][1][0], weights[r][1][1]));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
            top[r] = fmaxf(peak[r], most);
            grew = grew || top[r] > peak[r];
        }
        if (__any_sync(FULL_WARP, grew)) raise_peaks(peak, sum, values, top);
#pragma unroll
        for (u32 r = 0; r < ROWS; r++)
#pragma unroll
            for (u32 n = 0; n < 2; n++)
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    float logit = weights[r][n][i];
                    float weight = logit <= MASKED ? 0.0f : exp2_fast(logit - peak[r]);
                    weights[r][n][i] = weight;
                    sum[r] += weight;
                }
        u32 a[P_PASSES][4];
#pragma unroll
        for (u32 n = 0; n < 2; n++)
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                float x = weights[PACKED ? 0 : r][n][0], y = weights[PACKED ? 0 : r][n][1];
                if (PACKED && r == 1) {
                    x = rest_of(x);
                    y = rest_of(y);
                }
#pragma unroll
                for (u32 pass = 0; pass < P_PASSES; pass++) {
                    bool used = !PACKED || 2 * pass + r < P_SPLITS;
                    a[pass][n * 2 + r] = used ? pack_pair<KV_DTYPE>(x, y) : 0;
                    x = rest_of(x);
                    y = rest_of(y);
                    if (PACKED) {
                        x = rest_of(x);
                        y = rest_of(y);
                    }
                }
            }
#if LINEAR
        // Four rows, eight channels of each.
        uint4 rows[4];
#endif
#pragma unroll
        for (u32 step = 0; step < V_STEPS; step++) {
            u32 b[4];
#if LINEAR
            if (step % 4 == 0)
#pragma unroll
                for (u32 i = 0; i < 4; i++) rows[i] = load_four(values_at + (i / 2 * 8 + i % 2) * VALUE_DIM * 2 + step * 32);
            // One channel of two rows, and the next one.
#pragma unroll
            for (u32 i = 0; i < 4; i++) b[i] = halves_of(word_of(rows[i % 2 * 2], step % 4), word_of(rows[i % 2 * 2 + 1], step % 4), i / 2);
#else
            load_matrices_transposed(b, values_at + step * 32);
#endif
            add_values<true>(&values[step * 2], a, b);
        }
    }

    // Writes what the warp has as one of the block's results: per head peak and sum, from the fourth float on values.
    __device__ __forceinline__ void store(float* result) {
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 1);
            sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 2);
            u32 head = row() + 8 * r;
            if (head >= HEADS) continue;
            float* mine = result + head * RESULT_HEAD;
            if (threadIdx.x % 4 == 0) {
                mine[0] = peak[r];
                mine[1] = sum[r];
            }
#pragma unroll
            for (u32 i = 0; i < V_STEPS * 2; i++) {
                float x = PACKED ? values[i][0] + values[i][2] : values[i][2 * r];
                float y = PACKED ? values[i][1] + values[i][3] : values[i][2 * r + 1];
                mine[4 + value_channel(i, 0)] = x;
                mine[4 + value_channel(i, 1)] = y;
            }
        }
    }
};

// Merges the results of the block's warps in their order, and in the last block of the heads those of the spans.
template <u32 THREADS>
__device__ __forceinline__ void merge_results(const Call& p, const Row& row, u32 row_index, const Heads& heads, const float* results) {
    const u32 first_q = heads.kv_head * GROUP + heads.first;
    for (u32 head = threadIdx.x >> 5; head < heads.count; head += THREADS / 32) {
        Merged merged = merge_of<WARPS>(results + head * RESULT_HEAD, RESULT, WARPS);
        if (row.part_count == 1) {
            store_merged(p, (u64)row_index * Q_HEADS + first_q + head, merged);
            continue;
        }
        float* part = p.partials + ((u64)row.part_base + (u64)(first_q + head) * row.part_count + blockIdx.x) * PART_STRIDE;
        store_part(part, merged);
    }
    if (row.part_count > 1 && is_last(&p.arrivals[(u64)blockIdx.z * gridDim.y + blockIdx.y], row.part_count))
        merge_parts<THREADS, TOGETHER>(p, row, row_index, first_q, heads.count);
}
