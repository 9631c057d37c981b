// Attention of the query heads of one kv head over tiles of 16 keys, 16-bit keys and values, by warps that each work alone.
//
// A warp copies its tiles to shared memory some tiles ahead. Logits are a product of 16 rows of the query by 16 keys,
// values one of 16 rows of weights by the value rows. Numbers that 16 bits cannot hold are split into several that can;
// where there are at most 8 heads the other 8 rows carry the second part for free.
#pragma once
#include "partials.cuh"

#define TILE 16
#define K_STEPS ((HEAD_DIM + 15) / 16)
#define V_STEPS ((VALUE_DIM + 15) / 16)
// Bytes of a row in shared memory: 16 spare ones keep the rows of a matrix in different banks.
#define K_ROW (K_STEPS * 32 + 16)
#define V_ROW (V_STEPS * 32 + 16)
#define STAGE (TILE * (K_ROW + V_ROW))
#define PACKED (HEADS <= 8)
#define ROWS (PACKED ? 1 : 2)
#define Q_PASSES (PACKED ? (Q_SPLITS + 1) / 2 : Q_SPLITS)
#define P_PASSES (PACKED ? (P_SPLITS + 1) / 2 : P_SPLITS)
#define RESULT (HEADS * (V_STEPS * 16 + 4))
// Large queries stay in shared memory, as each lane will want them.
#define QUERY_SHARED (Q_PASSES * K_STEPS > 8)

// The `split`-th part of x: what is left after those before, rounded to 16 bits.
template <int SPLIT> __device__ __forceinline__ float part_of(float x) {
#pragma unroll
    for (int i = 0; i < SPLIT; i++) x -= widen<KV_DTYPE>(narrow<KV_DTYPE>(x));
    return x;
}
__device__ __forceinline__ float rest_of(float x) { return x - widen<KV_DTYPE>(narrow<KV_DTYPE>(x)); }

struct Work {
    const Call* p;
    u32 sequence, kv_head, first, count;
#if SPARSE
    // Numbers of tokens, and which heads chose them from bit 16 on.
    const u32* chosen;
#ifdef CLUSTER
    // Numbers count this block's own tokens from here on.
    u32 start, rank;
#else
    // Addresses of the pages from the one on that tokens are numbered from.
    const u64* page_bases;
#endif

    // The token of a number, or one in the same place of its page, and the page.
    __device__ __forceinline__ u64 page_of_number(u32 number, u32& token) const {
#ifdef CLUSTER
        token = token_of(start + number, rank);
        return page_of(*p, sequence, token);
#else
        token = number;
        return page_bases[number / PAGE];
#endif
    }
#endif
};

// Starts to copy tile `tile` to `stage`, by a warp.
__device__ __forceinline__ void copy_tile(const Work& w, u32 stage, u32 tile, u32 lane) {
    u32 base = tile * TILE;
#if !SPARSE
    u32 first = w.first + min_u32(base, w.count - 1);
    u64 page = page_of(*w.p, w.sequence, first);
    u64 keys = key_row(page, w.kv_head, first), values = value_row(page, w.kv_head, first);
#endif
#pragma unroll
    for (u32 i = 0; i < (TILE * K_PIECES + 31) / 32; i++) {
        u32 at = i * 32 + lane, row = at / K_PIECES, piece = at % K_PIECES;
        if (TILE * K_PIECES % 32 == 0 || row < TILE) {
            bool valid = base + row < w.count;
#if SPARSE
            u32 token;
            u64 page = w.page_of_number(w.chosen[valid ? base + row : 0] & 0xffffu, token);
            u64 from = key_row(page, w.kv_head, token) + piece * 16;
#else
            u64 from = keys + (valid ? row : 0) * (K_PIECES * 16) + piece * 16;
#endif
            copy_piece(stage + row * K_ROW + piece * 16, from, valid);
        }
    }
#pragma unroll
    for (u32 i = 0; i < (TILE * V_PIECES + 31) / 32; i++) {
        u32 at = i * 32 + lane, row = at / V_PIECES, piece = at % V_PIECES;
        if (TILE * V_PIECES % 32 == 0 || row < TILE) {
            bool valid = base + row < w.count;
#if SPARSE
            u32 token;
            u64 page = w.page_of_number(w.chosen[valid ? base + row : 0] & 0xffffu, token);
            u64 from = value_row(page, w.kv_head, token) + piece * 16;
#else
            u64 from = values + (valid ? row : 0) * (V_PIECES * 16) + piece * 16;
#endif
            copy_piece(stage + TILE * K_ROW + row * V_ROW + piece * 16, from, valid);
        }
    }
}

__device__ __forceinline__ float query_at(const Call& p, i64 at, u32 head, u32 channel, bool valid) {
    valid = valid && channel < HEAD_DIM;
    return valid ? input_element<Q_DTYPE>(p.q, at + head * p.q_strides.head + channel) : 0.0f;
}

// What a warp knows of the attention of its keys. `lane` and `warp` are those of the thread.
struct Tiles {
    Work w;
    u32 lane, warp;
    // Shared memory of this warp's tiles, and which of them is next.
    u32 stages, stage;
#if QUERY_SHARED
    uint4 (*query)[K_STEPS][32];
#else
    u32 query[Q_PASSES][K_STEPS][4];
#endif
    float values[V_STEPS * 2][4];
    float peak[ROWS], sum[ROWS];

    // Starts to copy the first of `tiles` tiles.
    __device__ __forceinline__ void start(u32 tiles) {
#pragma unroll
        for (u32 s = 0; s < STAGES - 1; s++) {
            u32 tile = warp + s * WARPS;
            u32 to = stage + s >= STAGES ? stage + s - STAGES : stage + s;
            if (tile < tiles) copy_tile(w, stages + to * STAGE, tile, lane);
            copies_commit();
        }
    }

    // Takes the query in, by all threads.
    __device__ __forceinline__ void load_query(u32 row_index, u32 first_head, u32 heads) {
        const Call& p = *w.p;
        const u32 kv_head = w.kv_head;
#if QUERY_SHARED
        __shared__ uint4 shared_query[Q_PASSES][K_STEPS][32];
        query = shared_query;
#endif
        // Rows of the query: lane / 4 and that plus 8; columns lane % 4 · 2 and on.
        i64 q_at = (row_index / p.tq) * p.q_strides.batch + (row_index % p.tq) * p.q_strides.token
            + (i64)(kv_head * GROUP + first_head) * p.q_strides.head;
        u32 of_row = lane / 4, pair = lane % 4 * 2;
#if QUERY_SHARED
        for (u32 step = warp; step < K_STEPS; step += WARPS) {
#else
#pragma unroll
        for (u32 step = 0; step < K_STEPS; step++) {
#endif
            u32 parts[Q_PASSES][4];
#pragma unroll
            for (u32 side = 0; side < 2; side++) {
                u32 channel = step * 16 + side * 8 + pair;
#pragma unroll
                for (u32 r = 0; r < 2; r++) {
                    u32 head = PACKED ? of_row : of_row + 8 * r;
                    float a = query_at(p, q_at, head, channel, head < heads);
                    float b = query_at(p, q_at, head, channel + 1, head < heads);
                    if (PACKED && r == 1) {
                        a = rest_of(a);
                        b = rest_of(b);
                    }
#pragma unroll
                    for (u32 pass = 0; pass < Q_PASSES; pass++) {
                        // Parts that are not asked for are zero.
                        bool used = !PACKED || 2 * pass + r < Q_SPLITS;
                        parts[pass][side * 2 + r] = used ? pack_pair<KV_DTYPE>(a, b) : 0;
                        a = rest_of(a);
                        b = rest_of(b);
                        if (PACKED) {
                            a = rest_of(a);
                            b = rest_of(b);
                        }
                    }
                }
            }
#pragma unroll
            for (u32 pass = 0; pass < Q_PASSES; pass++) {
#if QUERY_SHARED
                query[pass][step][lane] = uint4{parts[pass][0], parts[pass][1], parts[pass][2], parts[pass][3]};
#else
#pragma unroll
                for (u32 i = 0; i < 4; i++) query[pass][step][i] = parts[pass][i];
#endif
            }
        }
#if QUERY_SHARED
        __syncthreads();
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

    // Attends to this warp's of `tiles` tiles, which were started.
    __device__ __forceinline__ void run(u32 tiles) {
        const float scale = w.p->scale * LOG2_E;
        const u32 pair = lane % 4 * 2;
#if SPARSE
        const u32 of_row = lane / 4;
#endif
        for (u32 tile = warp; tile < tiles; tile += WARPS) {
            // The stage that was read in the round before is free: all lanes are past it.
            u32 later = tile + (STAGES - 1) * WARPS, to = stage == 0 ? STAGES - 1 : stage - 1;
            copies_wait<STAGES - 2>();
            __syncwarp();
            if (later < tiles) copy_tile(w, stages + to * STAGE, later, lane);
            copies_commit();
            u32 keys = stages + stage * STAGE, rows_of_values = keys + TILE * K_ROW;
            stage = stage + 1 == STAGES ? 0 : stage + 1;
            // Two products of 8 keys each.
            float logits[2][4] = {};
            {
                // Lanes 0 to 7 point at keys 0 to 7, the next 8 at their other half, then keys 8 to 15.
                u32 at = keys + (lane % 8 + lane / 16 * 8) * K_ROW + lane / 8 % 2 * 16;
#pragma unroll
                for (u32 step = 0; step < K_STEPS; step++) {
                    u32 b[4];
                    load_matrices(b, at + step * 32);
#pragma unroll
                    for (u32 pass = 0; pass < Q_PASSES; pass++) {
#if QUERY_SHARED
                        uint4 loaded = query[pass][step][lane];
                        u32 a[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#else
                        const u32(&a)[4] = query[pass][step];
#endif
                        mma16<KV_DTYPE>(logits[0], a, b[0], b[1]);
                        mma16<KV_DTYPE>(logits[1], a, b[2], b[3]);
                    }
                }
            }
            // weights[r][n][i]: row, eight keys, key.
            float weights[ROWS][2][2];
#pragma unroll
            for (u32 n = 0; n < 2; n++)
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    u32 key = tile * TILE + n * 8 + pair + i;
                    bool inside = key < w.count;
#if SPARSE
                    u32 mask = inside ? w.chosen[key] >> 16 : 0;
#endif
#pragma unroll
                    for (u32 r = 0; r < ROWS; r++) {
                        float logit = PACKED ? logits[n][i] + logits[n][i + 2] : logits[n][2 * r + i];
#if SPARSE
                        bool seen = mask >> (of_row + 8 * r) & 1u;
#else
                        bool seen = inside;
#endif
                        weights[r][n][i] = seen ? logit * scale : MASKED;
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
            if (__any_sync(FULL_WARP, grew)) {
                float keep[ROWS];
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) {
                    keep[r] = exp2_fast(peak[r] - top[r]);
                    sum[r] *= keep[r];
                    peak[r] = top[r];
                }
#pragma unroll
                for (u32 i = 0; i < V_STEPS * 2; i++)
#pragma unroll
                    for (u32 c = 0; c < 4; c++) values[i][c] *= keep[PACKED ? 0 : c / 2];
            }
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
            {
                // Lanes 0 to 15 point at the 16 keys, 8 channels; the others at the next 8 channels.
                u32 at = rows_of_values + lane % 16 * V_ROW + lane / 16 * 16;
#pragma unroll
                for (u32 step = 0; step < V_STEPS; step++) {
                    u32 b[4];
                    load_matrices_transposed(b, at + step * 32);
#pragma unroll
                    for (u32 pass = 0; pass < P_PASSES; pass++) {
                        mma16<KV_DTYPE>(values[step * 2], a[pass], b[0], b[1]);
                        mma16<KV_DTYPE>(values[step * 2 + 1], a[pass], b[2], b[3]);
                    }
                }
            }
        }
        copies_wait<0>();
    }

    // Leaves this warp's result in shared memory: RESULT floats.
    __device__ __forceinline__ void store(float* results) {
        const u32 of_row = lane / 4, pair = lane % 4 * 2;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 1);
            sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 2);
        }

        {
            float* mine = results + warp * RESULT;
            const u32 width = V_STEPS * 16 + 4;
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                u32 head = of_row + 8 * r;
                if (head < HEADS) {
                    if (lane % 4 == 0) {
                        mine[head * width] = peak[r];
                        mine[head * width + 1] = sum[r];
                    }
#pragma unroll
                    for (u32 i = 0; i < V_STEPS * 2; i++) {
                        float x = PACKED ? values[i][0] + values[i][2] : values[i][2 * r];
                        float y = PACKED ? values[i][1] + values[i][3] : values[i][2 * r + 1];
                        mine[head * width + 4 + i * 8 + pair] = x;
                        mine[head * width + 4 + i * 8 + pair + 1] = y;
                    }
                }
            }
        }
    }
};

// Merges the results of WARPS warps at one channel of one head; in their order.
__device__ __forceinline__ void merge_warps(const float* results, u32 head, u32 channel, float& top, float& total, float& value) {
    const u32 width = V_STEPS * 16 + 4;
    const float* at = results + head * width;
    top = MASKED, total = 0.0f, value = 0.0f;
    for (u32 g = 0; g < WARPS; g++) top = fmaxf(top, at[g * RESULT]);
    for (u32 g = 0; g < WARPS; g++) {
        float weight = at[g * RESULT + 1] > 0.0f ? exp2_fast(at[g * RESULT] - top) : 0.0f;
        total += at[g * RESULT + 1] * weight;
        value += at[g * RESULT + 4 + channel] * weight;
    }
}
