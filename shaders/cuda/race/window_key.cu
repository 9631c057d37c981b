// Adds the window's part of dk and dv: one block per (kv head, tile of 64 keys, sequence). The first tiles are of keys
// before the call: what they get belongs to the gradient of the ring.
#include "window_tiles.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, 2) window_key(const Params p, const u32 *far, const u64 *seen, const float *gates, const void *q, const void *k,
                                                                 const void *v, const void *ring, const void *grad_o, const float2 *kept, float *dk,
                                                                 float *dv, float *ring_grads) {
    // lse, g·grad_o·o and the gate of each query.
    __shared__ float4 readings[2][OTHERS];
    SHARED_BYTES;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int head = blockIdx.x % KV_HEADS, b = blockIdx.x / KV_HEADS / p.tiles;
    int first = ((int)(blockIdx.x / KV_HEADS % p.tiles) - (int)p.ring_tiles) * ROWS;
    Sequence s = sequence_of(p, far, seen, b);
    // The end of the keys on this side of the call's beginning.
    int end = first < 0 ? 0 : (int)s.length;
    int first_token = first > 0 ? first : 0, last_token = (first + ROWS < end ? first + ROWS : end) - 2 + (int)p.window;
    if (last_token > (int)s.length - 1) last_token = (int)s.length - 1;
    int queries = first < end && first + ROWS > -(int)s.past && last_token >= first_token ? (last_token + 1 - first_token) * GROUP : 0;
    int tiles = (queries + OTHERS - 1) / OTHERS;
    if (tiles == 0) return;
    auto exists = [&](int key) { return first + key < end && first + key >= -(int)s.past; };
    Carve carve{shared_bytes};
    u16 *keys = carve.take<u16>(KEY_BYTES<ROWS>), *values = carve.take<u16>(VALUE_BYTES<ROWS>);
    u16 *tile_queries = carve.take<u16>(WINDOW_STAGES * KEY_BYTES<OTHERS>), *tile_grads = carve.take<u16>(WINDOW_STAGES * VALUE_BYTES<OTHERS>);
    Row none = {nullptr, 0};
    auto fetch_tile = [&](int tile) {
        int query = tile * OTHERS;
        auto token_at = [&](int i) { return first_token + (query + i) / GROUP; };
        auto head_at = [&](int i) { return head * GROUP + (query + i) % GROUP; };
        if (GROUP == 1 && query + OTHERS <= queries) {
            fetch_line<HEAD_DIM, OTHERS>(keys_of(tile_queries, tile), query_row(p, q, b, token_at(0), head), p.q_token);
            fetch_line<VALUE_DIM, OTHERS>(values_of(tile_grads, tile), grad_row(p, grad_o, b, token_at(0), head), p.g_token);
        } else {
            fetch_rows<HEAD_DIM, OTHERS>(keys_of(tile_queries, tile), k, [&](int i) { return query + i < queries ? query_row(p, q, b, token_at(i), head_at(i)) : none; });
            fetch_rows<VALUE_DIM, OTHERS>(values_of(tile_grads, tile), k, [&](int i) { return query + i < queries ? grad_row(p, grad_o, b, token_at(i), head_at(i)) : none; });
        }
    };
    // A query's numbers, a tile ahead.
    float4 reading = {0.0f, 0.0f, 0.0f, 0.0f};
    auto read_ahead = [&](int tile) {
        int query = tile * OTHERS + threadIdx.x, token = first_token + query / GROUP, q_head = head * GROUP + query % GROUP;
        if (threadIdx.x < OTHERS && query < queries) {
            float2 of_query = kept[query_at(p, b, token, q_head)];
            reading = float4{of_query.x, of_query.y, gates[q_head], 0.0f};
        }
    };
    read_ahead(0);
    fetch_rows<HEAD_DIM, ROWS>(keys, k, [&](int i) { return exists(i) ? key_row(p, s, k, ring, b, first + i, head) : none; });
    fetch_rows<VALUE_DIM, ROWS>(values, k, [&](int i) { return exists(i) ? value_row(p, s, v, ring, b, first + i, head) : none; });
    for (int tile = 0; tile < WINDOW_STAGES - 1; tile++) {
        if (tile < tiles) fetch_tile(tile);
        copies_commit();
    }
    float of_keys[KEY_STEPS * 2][4], of_values[VALUE_STEPS * 2][4];
    clear(of_keys);
    clear(of_values);
    int warp_first = first + warp * 16, position[2] = {warp_first + lane / 4, warp_first + lane / 4 + 8};
    for (int tile = 0; tile < tiles; tile++) {
        int query = tile * OTHERS;
        next_tile(tile, tiles, fetch_tile, [&] {
            if (tile == 0) {
                clean_rows<HEAD_DIM, ROWS>(keys);
                clean_rows<VALUE_DIM, ROWS>(values);
            }
            clean_rows<HEAD_DIM, OTHERS>(keys_of(tile_queries, tile));
            clean_rows<VALUE_DIM, OTHERS>(values_of(tile_grads, tile));
            if (threadIdx.x < OTHERS) readings[tile & 1][threadIdx.x] = reading;
        });
        read_ahead(tile + 1);
        // No query that sees the warp's keys.
        int tile_first = first_token + query / GROUP, tile_last = first_token + (query + OTHERS - 1) / GROUP;
        if (tile_last < warp_first || tile_first >= warp_first + 15 + (int)p.window) continue;
        bool whole = tile_first >= warp_first + 15 && tile_last < warp_first + (int)p.window && query + OTHERS <= queries && warp_first + 15 < end &&
                     warp_first >= -(int)s.past;
        float weights[OTHERS / 8][4], slopes[OTHERS / 8][4];
        clear(weights);
        clear(slopes);
        add_products<KEY_STEPS>(weights, Keys<ROWS>{keys}, warp * 16, Keys<OTHERS>{keys_of(tile_queries, tile)});
        add_products<VALUE_STEPS>(slopes, Values<ROWS>{values}, warp * 16, Values<OTHERS>{values_of(tile_grads, tile)});
#pragma unroll
        for (int n = 0; n < OTHERS / 8; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int r = c / 2, column = n * 8 + lane % 4 * 2 + c % 2, token = first_token + (query + column) / GROUP;
                float4 of_query = readings[tile & 1][column];
                float above = weights[n][c] * (p.scale * WINDOW_LOG2_E) - of_query.x;
                bool seen = whole || (query + column < queries && position[r] < end && sees(p, s, token, position[r]));
                float weight = seen ? exp2_fast(above < 0.0f ? above : 0.0f) : 0.0f;
                slopes[n][c] = weight * (of_query.z * slopes[n][c] - of_query.y) * p.scale;
                weights[n][c] = weight * of_query.z;
            }
        }
        add_weighted(of_values, weights, Values<OTHERS>{values_of(tile_grads, tile)});
        add_weighted(of_keys, slopes, Keys<OTHERS>{keys_of(tile_queries, tile)});
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        if (position[r] >= end || position[r] < -(int)s.past) continue;
        i64 row = ((i64)b * p.tokens + position[r]) * KV_HEADS + head;
        float *of_key = position[r] < 0 ? ring_grads + ring_row(p, s, b, position[r], head) : dk + row * HEAD_DIM;
        float *of_value = position[r] < 0 ? of_key + HEAD_DIM : dv + row * VALUE_DIM;
#pragma unroll
        for (int n = 0; n < KEY_STEPS * 2; n++) {
            float2 *to = (float2 *)(of_key + n * 8 + lane % 4 * 2), x = *to;
            *to = {x.x + of_keys[n][2 * r], x.y + of_keys[n][2 * r + 1]};
        }
#pragma unroll
        for (int n = 0; n < VALUE_STEPS * 2; n++) {
            float2 *to = (float2 *)(of_value + n * 8 + lane % 4 * 2), x = *to;
            *to = {x.x + of_values[n][2 * r], x.y + of_values[n][2 * r + 1]};
        }
    }
}
