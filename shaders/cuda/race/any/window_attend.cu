// Exact attention of 32 query rows over their window: one block per (kv head, tile of rows, sequence). What it leaves is o
// mixed with RACE's, in the dtype asked for; or, with HALVE, what a backward pass goes on from: (1 − g)·grad_o, lse in base
// 2 and g·grad_o·o, and shares of the gates' gradients.
#include "window_tile.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_window_attend(const Params p, const u32 *far, const u64 *seen, const float *gates, const void *q, const void *k,
                                                                      const void *v, const void *ring, const void *race,
#ifdef HALVE
                                                                      const void *grad_o, void *half, float2 *kept, float *shares) {
    __shared__ float of_rows[TILE];
#else
                                                                      void *out) {
#endif
    __shared__ Tile tile;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Rows rows = rows_of<TILE>(p);
    Sequence s = sequence_of(p, far, seen, rows.b);
    end_rows<TILE>(rows, s.length);
    float total[OWN_VALUES][4], peak[4], sum[4];
    clear_sums(total);
    for (int r = 0; r < 4; r++) {
        peak[r] = MASKED;
        sum[r] = 0.0f;
    }
    for (int first = first_key(p, s, rows); first <= rows.last_token; first += TILE) {
        float logits[4] = {0.0f, 0.0f, 0.0f, 0.0f};
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
        float keep[4];
        for (int r = 0; r < 4; r++) {
            bool seen = sees(p, s, token_of(rows, warp * 4 + r), first + lane);
            float logit = seen ? logits[r] * (p.scale * WINDOW_LOG2_E) : MASKED, top = warp_max(logit);
            top = top > peak[r] ? top : peak[r];
            float weight = seen ? exp2f(logit - top) : 0.0f;
            keep[r] = exp2f(peak[r] - top);
            peak[r] = top;
            sum[r] = sum[r] * keep[r] + warp_sum(weight);
            tile.weights[lane][warp * 4 + r] = weight;
        }
        warp_barrier();
#pragma unroll
        for (int i = 0; i < OWN_VALUES; i++) {
            for (int r = 0; r < 4; r++) total[i][r] *= keep[r];
        }
        int count = rows.last_token + 1 - first;
        add_weighted<VALUE_DIM>(tile, total, count < TILE ? count : TILE, [&](int j, int c) {
            Row at = value_row(p, s, v, ring, rows.b, first + j, rows.head);
            return load<IN_TYPE>(at.from, at.at + c);
        });
    }
#pragma unroll
    for (int r = 0; r < 4; r++) {
        int row = warp * 4 + r, token = token_of(rows, row), head = head_of(rows, row);
        float inverse = sum[r] > 0.0f ? 1.0f / sum[r] : 0.0f, gate = gates[head];
        i64 at = query_at(p, rows.b, token, head);
#ifdef HALVE
        float of_window = 0.0f, of_race = 0.0f;
        if (token <= rows.last_token) {
            i64 of_grad = rows.b * p.g_batch + token * p.g_token + head * p.g_head;
#pragma unroll
            for (int i = 0; i < OWN_VALUES; i++) {
                int c = i * 32 + lane;
                if (c >= VALUE_DIM) continue;
                float g = load<GRAD_TYPE>(grad_o, of_grad + c);
                of_window += g * (total[i][r] * inverse);
                of_race += g * load<RACE_TYPE>(race, at * VALUE_DIM + c);
                store<RACE_TYPE>(half, at * VALUE_DIM + c, (1.0f - gate) * g);
            }
        }
        of_window = warp_sum(of_window);
        of_race = warp_sum(of_race);
        if (lane == 0) {
            of_rows[row] = of_window - of_race;
            if (token <= rows.last_token) kept[at] = {peak[r] + log2f(sum[r]), gate * of_window};
        }
#else
        if (token >= (int)p.tokens) continue;
#pragma unroll
        for (int i = 0; i < OWN_VALUES; i++) {
            int c = i * 32 + lane;
            if (c >= VALUE_DIM) continue;
            // Rows after a sequence's end are zero.
            float x = token <= rows.last_token ? gate * (total[i][r] * inverse) + (1.0f - gate) * load<RACE_TYPE>(race, at * VALUE_DIM + c) : 0.0f;
            store<OUT_TYPE>(out, at * VALUE_DIM + c, x);
        }
#endif
    }
#ifdef HALVE
    barrier();
    for (int h = threadIdx.x; h < GROUP; h += BLOCK) {
        float share = 0.0f;
        for (int row = 0; row < TILE; row++) {
            if ((rows.first + row) % GROUP == h) share += of_rows[row];
        }
        shares[((i64)rows.b * p.tiles + rows.first / TILE) * Q_HEADS + rows.head * GROUP + h] = share;
    }
#endif
}
