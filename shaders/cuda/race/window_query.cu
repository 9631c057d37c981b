// Adds the window's part of dq: one block per (kv head, tile of 64 query rows, sequence).
#include "window_tiles.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2) window_query(const Params p, const u32 *far, const u64 *seen, const float *gates, const void *q, const void *k,
                                                                   const void *v, const void *ring, const void *grad_o, const float2 *kept, float *dq) {
    SHARED_BYTES;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Rows rows = rows_of<ROWS>(p);
    Sequence s = sequence_of(p, far, seen, rows.b);
    end_rows<ROWS>(rows, s.length);
    Carve carve{shared_bytes};
    u16 *queries = carve.take<u16>(KEY_BYTES<ROWS>), *grads = carve.take<u16>(VALUE_BYTES<ROWS>);
    u16 *of_keys = carve.take<u16>(WINDOW_STAGES * KEY_BYTES<OTHERS>), *of_values = carve.take<u16>(WINDOW_STAGES * VALUE_BYTES<OTHERS>);
    int first = first_key(p, s, rows), tiles = rows.last_token < first ? 0 : (rows.last_token - first) / OTHERS + 1;
    if (tiles == 0) return;
    Row none = {nullptr, 0};
    auto fetch_tile = [&](int tile) { fetch_keys(p, s, rows, keys_of(of_keys, tile), values_of(of_values, tile), k, v, ring, first + tile * OTHERS); };
    fetch_rows<HEAD_DIM, ROWS>(queries, k, [&](int i) { return token_of(rows, i) <= rows.last_token ? query_row(p, q, rows.b, token_of(rows, i), head_of(rows, i)) : none; });
    fetch_rows<VALUE_DIM, ROWS>(grads, k, [&](int i) { return token_of(rows, i) <= rows.last_token ? grad_row(p, grad_o, rows.b, token_of(rows, i), head_of(rows, i)) : none; });
    for (int tile = 0; tile < WINDOW_STAGES - 1; tile++) {
        if (tile < tiles) fetch_tile(tile);
        copies_commit();
    }
    float total[KEY_STEPS * 2][4], lse[2], mean[2], gate[2];
    clear(total);
    int token[2];
    for (int r = 0; r < 2; r++) {
        int row = warp * 16 + lane / 4 + 8 * r, head = head_of(rows, row);
        token[r] = token_of(rows, row);
        float2 of_row = {0.0f, 0.0f};
        if (token[r] <= rows.last_token) of_row = kept[query_at(p, rows.b, token[r], head)];
        lse[r] = of_row.x;
        mean[r] = of_row.y;
        gate[r] = gates[head];
    }
    int warp_first = token_of(rows, warp * 16), warp_last = token_of(rows, warp * 16 + 15);
    for (int tile = 0; tile < tiles; tile++) {
        int position = first + tile * OTHERS;
        next_tile(tile, tiles, fetch_tile, [&] {
            if (tile == 0) {
                clean_rows<HEAD_DIM, ROWS>(queries);
                clean_rows<VALUE_DIM, ROWS>(grads);
            }
            clean_rows<HEAD_DIM, OTHERS>(keys_of(of_keys, tile));
            clean_rows<VALUE_DIM, OTHERS>(values_of(of_values, tile));
        });
        // Nothing that the warp's rows see.
        if (position > warp_last || position + OTHERS <= warp_first + 1 - (int)p.window) continue;
        float logits[OTHERS / 8][4], slopes[OTHERS / 8][4];
        clear(logits);
        clear(slopes);
        bool whole = warp_last <= rows.last_token && position + OTHERS - 1 <= warp_first && position > warp_last - (int)p.window;
        add_products<KEY_STEPS>(logits, Keys<ROWS>{queries}, warp * 16, Keys<OTHERS>{keys_of(of_keys, tile)});
        add_products<VALUE_STEPS>(slopes, Values<ROWS>{grads}, warp * 16, Values<OTHERS>{values_of(of_values, tile)});
#pragma unroll
        for (int n = 0; n < OTHERS / 8; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int r = c / 2, key = position + n * 8 + lane % 4 * 2 + c % 2;
                float above = logits[n][c] * (p.scale * WINDOW_LOG2_E) - lse[r];
                float weight = exp2_fast(above < 0.0f ? above : 0.0f);
                bool seen = whole || (token[r] <= rows.last_token && sees(p, s, token[r], key));
                slopes[n][c] = seen ? weight * (gate[r] * slopes[n][c] - mean[r]) * p.scale : 0.0f;
            }
        }
        add_weighted(total, slopes, Keys<OTHERS>{keys_of(of_keys, tile)});
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (token[r] > rows.last_token) continue;
        float *to = dq + query_at(p, rows.b, token[r], head_of(rows, warp * 16 + lane / 4 + 8 * r)) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
        for (int n = 0; n < KEY_STEPS * 2; n++) {
            float2 x = *(const float2 *)(to + n * 8);
            x.x += total[n][2 * r];
            x.y += total[n][2 * r + 1];
            *(float2 *)(to + n * 8) = x;
        }
    }
}
