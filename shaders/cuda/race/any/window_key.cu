// Adds the window's part of dk and dv: one block per (kv head, tile of 32 keys, sequence). The first tiles are of keys
// before the call: what they get belongs to the gradient of the ring.
#include "window_tile.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK, 1) any_window_key(const Params p, const u32 *far, const u64 *seen, const float *gates, const void *q, const void *k,
                                                                   const void *v, const void *ring, const void *grad_o, const float2 *kept, float *dk,
                                                                   float *dv, float *ring_grads) {
    __shared__ Tile tile;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    int head = blockIdx.x % KV_HEADS, b = blockIdx.x / KV_HEADS / p.tiles;
    int first = ((int)(blockIdx.x / KV_HEADS % p.tiles) - (int)p.ring_tiles) * TILE;
    Sequence s = sequence_of(p, far, seen, b);
    // The end of the keys on this side of the call's beginning.
    int end = first < 0 ? 0 : (int)s.length;
    int first_token = first > 0 ? first : 0, last_token = (first + TILE < end ? first + TILE : end) - 2 + (int)p.window;
    if (last_token > (int)s.length - 1) last_token = (int)s.length - 1;
    int queries = first < end && first + TILE > -(int)s.past && last_token >= first_token ? (last_token + 1 - first_token) * GROUP : 0;
    auto exists = [&](int key) { return first + key < end && first + key >= -(int)s.past; };
    auto query_of = [&](int query, i64 batch, i64 token, i64 head_step) {
        return b * batch + (first_token + query / GROUP) * token + (head * GROUP + query % GROUP) * head_step;
    };
    float of_keys[OWN][4], of_values[OWN_VALUES][4];
    clear_sums(of_keys);
    clear_sums(of_values);
    for (int query = 0; query < queries; query += TILE) {
        // Of keys (rows) and queries (columns).
        float logits[4] = {0.0f, 0.0f, 0.0f, 0.0f}, slopes[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        add_product<HEAD_DIM>(
            tile, logits,
            [&](int key, int c) {
                if (!exists(key)) return 0.0f;
                Row at = key_row(p, s, k, ring, b, first + key, head);
                return load<IN_TYPE>(at.from, at.at + c);
            },
            [&](int column, int c) { return query + column < queries ? load<IN_TYPE>(q, query_of(query + column, p.q_batch, p.q_token, p.q_head) + c) : 0.0f; });
        add_product<VALUE_DIM>(
            tile, slopes,
            [&](int key, int c) {
                if (!exists(key)) return 0.0f;
                Row at = value_row(p, s, v, ring, b, first + key, head);
                return load<IN_TYPE>(at.from, at.at + c);
            },
            [&](int column, int c) {
                return query + column < queries ? load<GRAD_TYPE>(grad_o, query_of(query + column, p.g_batch, p.g_token, p.g_head) + c) : 0.0f;
            });
        int token = first_token + (query + lane) / GROUP, q_head = head * GROUP + (query + lane) % GROUP;
        float2 of_query = {0.0f, 0.0f};
        if (query + lane < queries) of_query = kept[query_at(p, b, token, q_head)];
        float gate = gates[q_head], weights[4];
        for (int r = 0; r < 4; r++) {
            int key = warp * 4 + r;
            bool seen = query + lane < queries && exists(key) && sees(p, s, token, first + key);
            float above = logits[r] * (p.scale * WINDOW_LOG2_E) - of_query.x;
            weights[r] = seen ? exp2f(above < 0.0f ? above : 0.0f) : 0.0f;
            slopes[r] = weights[r] * (gate * slopes[r] - of_query.y) * p.scale;
            tile.weights[lane][key] = weights[r] * gate;
        }
        warp_barrier();
        int count = queries - query < TILE ? queries - query : TILE;
        add_weighted<VALUE_DIM>(tile, of_values, count, [&](int j, int c) { return load<GRAD_TYPE>(grad_o, query_of(query + j, p.g_batch, p.g_token, p.g_head) + c); });
        warp_barrier();
        for (int r = 0; r < 4; r++) tile.weights[lane][warp * 4 + r] = slopes[r];
        warp_barrier();
        add_weighted<HEAD_DIM>(tile, of_keys, count, [&](int j, int c) { return load<IN_TYPE>(q, query_of(query + j, p.q_batch, p.q_token, p.q_head) + c); });
    }
    for (int r = 0; r < 4; r++) {
        int key = warp * 4 + r, position = first + key;
        if (!exists(key)) continue;
        i64 row = ((i64)b * p.tokens + position) * KV_HEADS + head;
        float *of_key = position < 0 ? ring_grads + ring_row(p, s, b, position, head) : dk + row * HEAD_DIM;
        float *of_value = position < 0 ? of_key + HEAD_DIM : dv + row * VALUE_DIM;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int c = i * 32 + lane;
            if (c < HEAD_DIM) of_key[c] += of_keys[i][r];
        }
#pragma unroll
        for (int i = 0; i < OWN_VALUES; i++) {
            int c = i * 32 + lane;
            if (c < VALUE_DIM) of_value[c] += of_values[i][r];
        }
    }
}
