// Adds the window's part of dq: one block per (kv head, tile of 32 query rows, sequence).
#include "window_tile.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_window_query(const Params p, const u32 *far, const u64 *seen, const float *gates, const void *q, const void *k,
                                                                     const void *v, const void *ring, const void *grad_o, const float2 *kept, float *dq) {
    __shared__ Tile tile;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Rows rows = rows_of<TILE>(p);
    Sequence s = sequence_of(p, far, seen, rows.b);
    end_rows<TILE>(rows, s.length);
    float total[OWN][4], lse[4], mean[4], gate[4];
    clear_sums(total);
    for (int r = 0; r < 4; r++) {
        int row = warp * 4 + r, token = token_of(rows, row), head = head_of(rows, row);
        float2 of_row = {0.0f, 0.0f};
        if (token <= rows.last_token) of_row = kept[query_at(p, rows.b, token, head)];
        lse[r] = of_row.x;
        mean[r] = of_row.y;
        gate[r] = gates[head];
    }
    for (int first = first_key(p, s, rows); first <= rows.last_token; first += TILE) {
        float logits[4] = {0.0f, 0.0f, 0.0f, 0.0f}, slopes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        add_product<HEAD_DIM>(
            tile, logits,
            [&](int row, int c) {
                int token = token_of(rows, row);
                return token <= rows.last_token ? load<IN_TYPE>(q, rows.b * p.q_batch + token * p.q_token + head_of(rows, row) * p.q_head + c) : 0.0f;
            },
            [&](int key, int c) {
                if (first + key > rows.last_token) return 0.0f;
                Row at = key_row(p, s, k, ring, rows.b, first + key, rows.head);
                return load<IN_TYPE>(at.from, at.at + c);
            });
        add_product<VALUE_DIM>(
            tile, slopes,
            [&](int row, int c) {
                int token = token_of(rows, row);
                return token <= rows.last_token ? load<GRAD_TYPE>(grad_o, rows.b * p.g_batch + token * p.g_token + head_of(rows, row) * p.g_head + c) : 0.0f;
            },
            [&](int key, int c) {
                if (first + key > rows.last_token) return 0.0f;
                Row at = value_row(p, s, v, ring, rows.b, first + key, rows.head);
                return load<IN_TYPE>(at.from, at.at + c);
            });
        for (int r = 0; r < 4; r++) {
            int token = token_of(rows, warp * 4 + r);
            bool seen = token <= rows.last_token && sees(p, s, token, first + lane);
            float above = logits[r] * (p.scale * WINDOW_LOG2_E) - lse[r];
            float weight = exp2f(above < 0.0f ? above : 0.0f);
            tile.weights[lane][warp * 4 + r] = seen ? weight * (gate[r] * slopes[r] - mean[r]) * p.scale : 0.0f;
        }
        warp_barrier();
        int count = rows.last_token + 1 - first;
        add_weighted<HEAD_DIM>(tile, total, count < TILE ? count : TILE, [&](int j, int c) {
            Row at = key_row(p, s, k, ring, rows.b, first + j, rows.head);
            return load<IN_TYPE>(at.from, at.at + c);
        });
    }
    for (int r = 0; r < 4; r++) {
        int row = warp * 4 + r, token = token_of(rows, row);
        if (token > rows.last_token) continue;
        i64 at = query_at(p, rows.b, token, head_of(rows, row)) * HEAD_DIM;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int c = i * 32 + lane;
            if (c < HEAD_DIM) dq[at + c] += total[i][r];
        }
    }
}
