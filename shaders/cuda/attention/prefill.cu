// Exact causal attention for many query tokens, 16-bit keys and values: one block per (64 queries, kv head, sequence).
// A query is a (token, head of the group) pair; a sequence's row tells its length. Each warp holds 16 queries and walks
// over all tiles of keys, which the block copies to shared memory one tile ahead.
#include "partials.cuh"

#define WARPS 4
#define THREADS (WARPS * 32)
#define QUERIES (WARPS * 16)
#define K_STEPS ((HEAD_DIM + 15) / 16)
#define V_STEPS ((VALUE_DIM + 15) / 16)
#define K_ROW (K_STEPS * 32 + 16)
#define V_ROW (V_STEPS * 32 + 16)
#define STAGE (KEYS * (K_ROW + V_ROW))
#define QUERY_BYTES (Q_SPLITS * QUERIES * K_ROW)

extern __shared__ __align__(16) u8 memory[];

__device__ __forceinline__ void copy_tile(const Call& p, u32 stage, u32 sequence, u32 kv_head, u32 first, u32 reach) {
    u64 page = page_of(p, sequence, first);
    u64 keys = key_row(page, kv_head, first), values = value_row(page, kv_head, first);
    for (u32 at = threadIdx.x; at < KEYS * K_PIECES; at += THREADS) {
        u32 row = at / K_PIECES, piece = at % K_PIECES;
        bool valid = first + row < reach;
        copy_piece(stage + row * K_ROW + piece * 16, keys + (valid ? row : 0) * (K_PIECES * 16) + piece * 16, valid);
    }
    for (u32 at = threadIdx.x; at < KEYS * V_PIECES; at += THREADS) {
        u32 row = at / V_PIECES, piece = at % V_PIECES;
        bool valid = first + row < reach;
        copy_piece(stage + KEYS * K_ROW + row * V_ROW + piece * 16, values + (valid ? row : 0) * (V_PIECES * 16) + piece * 16, valid);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) prefill(ARGUMENTS) {
    CALL;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    // Long rows first, so that short ones fill the gaps at the end.
    u32 tile_of_queries = gridDim.x - 1 - blockIdx.x;
    u32 kv_head = blockIdx.y, batch = p.first_row + blockIdx.z;
    Row row = p.rows[batch];
    u32 queries = p.tq * GROUP, first_query = tile_of_queries * QUERIES;
    wait_for_earlier();
    auto visible_to = [&](u32 query) { u32 upto = row.visible + query / GROUP + 1; return upto > p.tq ? upto - p.tq : 0; };
    u32 reach = visible_to(min_u32(first_query + QUERIES, queries) - 1);
    u32 tiles = (reach + KEYS - 1) / KEYS;
    u32 shared = shared_address(memory), stages = shared + QUERY_BYTES;
#if HEAD_DIM % 16 != 0 || VALUE_DIM % 16 != 0
    for (u32 i = threadIdx.x; i < (QUERY_BYTES + 2 * STAGE) / 16; i += THREADS) ((uint4*)memory)[i] = uint4{0, 0, 0, 0};
    __syncthreads();
#endif
    if (tiles > 0) copy_tile(p, stages, row.sequence, kv_head, 0, reach);
    copies_commit();
    for (u32 i = threadIdx.x; i < QUERIES * K_STEPS * 8; i += THREADS) {
        u32 local = i / (K_STEPS * 8), channel = i % (K_STEPS * 8) * 2, query = first_query + local;
        float x[2] = {0.0f, 0.0f};
        if (query < queries) {
            i64 at = batch * p.q_strides.batch + query / GROUP * p.q_strides.token + (i64)(kv_head * GROUP + query % GROUP) * p.q_strides.head;
            if (channel < HEAD_DIM) x[0] = input_element<Q_DTYPE>(p.q, at + channel);
            if (channel + 1 < HEAD_DIM) x[1] = input_element<Q_DTYPE>(p.q, at + channel + 1);
        }
#pragma unroll
        for (u32 split = 0; split < Q_SPLITS; split++) {
            *(u32*)(memory + (split * QUERIES + local) * K_ROW + channel * 2) = pack_pair<KV_DTYPE>(x[0], x[1]);
            x[0] = rest_of(x[0]);
            x[1] = rest_of(x[1]);
        }
    }

    float scale = p.scale * LOG2_E;
    u32 of_row = lane / 4, pair = lane % 4 * 2;
    u32 seen[2];
    for (u32 r = 0; r < 2; r++) {
        u32 query = first_query + warp * 16 + of_row + 8 * r;
        seen[r] = query < queries ? visible_to(query) : 0;
    }
    // Tiles that all queries of the warp see whole need no masks.
    u32 first_of_warp = first_query + warp * 16;
    u32 whole = first_of_warp + 16 <= queries ? visible_to(first_of_warp) / KEYS : 0;
    float values[V_STEPS * 2][4];
#pragma unroll
    for (u32 i = 0; i < V_STEPS * 2; i++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) values[i][c] = 0.0f;
    float peak[2] = {MASKED, MASKED}, sum[2] = {0.0f, 0.0f};
    for (u32 tile = 0; tile < tiles; tile++) {
        copies_wait<0>();
        __syncthreads();
        if (tile + 1 < tiles) copy_tile(p, stages + (tile + 1) % 2 * STAGE, row.sequence, kv_head, (tile + 1) * KEYS, reach);
        copies_commit();
        u32 keys = stages + tile % 2 * STAGE, rows_of_values = keys + KEYS * K_ROW;
        float logits[KEYS / 8][4] = {};
#pragma unroll
        for (u32 step = 0; step < K_STEPS; step++) {
            u32 query[Q_SPLITS][4];
#pragma unroll
            for (u32 split = 0; split < Q_SPLITS; split++)
                load_matrices(query[split], shared + (split * QUERIES + warp * 16 + lane % 16) * K_ROW + step * 32 + lane / 16 * 16);
#pragma unroll
            for (u32 n = 0; n < KEYS / 16; n++) {
                u32 b[4];
                load_matrices(b, keys + (n * 16 + lane % 8 + lane / 16 * 8) * K_ROW + lane / 8 % 2 * 16 + step * 32);
#pragma unroll
                for (u32 split = 0; split < Q_SPLITS; split++) {
                    mma16<KV_DTYPE>(logits[n * 2], query[split], b[0], b[1]);
                    mma16<KV_DTYPE>(logits[n * 2 + 1], query[split], b[2], b[3]);
                }
            }
        }
        bool masks = tile >= whole;
        float top[2] = {peak[0], peak[1]};
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                float logit = logits[n][c] * scale;
                if (masks && tile * KEYS + n * 8 + pair + c % 2 >= seen[c / 2]) logit = MASKED;
                logits[n][c] = logit;
                top[c / 2] = fmaxf(top[c / 2], logit);
            }
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            top[r] = fmaxf(top[r], __shfl_xor_sync(FULL_WARP, top[r], 1));
            top[r] = fmaxf(top[r], __shfl_xor_sync(FULL_WARP, top[r], 2));
        }
        raise_peaks(peak, sum, values, top);
#pragma unroll
        for (u32 n = 0; n < KEYS / 8; n++)
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                float weight = logits[n][c] <= MASKED ? 0.0f : exp2_fast(logits[n][c] - peak[c / 2]);
                logits[n][c] = weight;
                sum[c / 2] += weight;
            }
#pragma unroll
        for (u32 n = 0; n < KEYS / 16; n++) {
            u32 a[P_SPLITS][4];
#pragma unroll
            for (u32 i = 0; i < 4; i++) {
                float x = logits[n * 2 + i / 2][i % 2 * 2], y = logits[n * 2 + i / 2][i % 2 * 2 + 1];
#pragma unroll
                for (u32 split = 0; split < P_SPLITS; split++) {
                    a[split][i] = pack_pair<KV_DTYPE>(x, y);
                    x = rest_of(x);
                    y = rest_of(y);
                }
            }
#pragma unroll
            for (u32 step = 0; step < V_STEPS; step++) {
                u32 b[4];
                load_matrices_transposed(b, rows_of_values + (n * 16 + lane % 16) * V_ROW + lane / 16 * 16 + step * 32);
                // Where results are of 16 bits, what is cut off is not seen.
                add_values<(P_SPLITS > 1)>(&values[step * 2], a, b);
            }
        }
    }
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 1);
        sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 2);
        u32 query = first_query + warp * 16 + of_row + 8 * r;
        if (query >= queries) continue;
        u64 index = ((u64)batch * p.tq + query / GROUP) * Q_HEADS + kv_head * GROUP + query % GROUP;
        float inverse = sum[r] > 0.0f ? divide(1.0f, sum[r]) : 0.0f;
#pragma unroll
        for (u32 i = 0; i < V_STEPS * 2; i++)
#pragma unroll
            for (u32 c = 0; c < 2; c++) {
                u32 channel = i * 8 + pair + c;
                if (channel < VALUE_DIM) store_element<OUT_DTYPE>(p.o, index * VALUE_DIM + channel, values[i][2 * r + c] * inverse);
            }
        if (lane % 4 == 0) store_lse(p, index, peak[r], sum[r]);
    }
}
