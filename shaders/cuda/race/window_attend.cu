// Exact attention of 64 query rows over their window: one block per (kv head, tile of rows, sequence). What it leaves is o
// mixed with RACE's, in the dtype asked for; or, with HALVE, what a backward pass goes on from: (1 − g)·grad_o, lse in base
// 2 and g·grad_o·o, and shares of the gates' gradients.
#include "window_tiles.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, WINDOW_BLOCKS) window_attend(const Params p, const Sequence *far, const float *gates, const void *q, const void *k,
                                                                    const void *v, const void *ring, const void *race,
#ifdef HALVE
                                                                    const void *grad_o, void *half, float2 *kept, float *shares) {
    __shared__ float of_rows[ROWS];
#else
                                                                    void *out) {
#endif
    SHARED_BYTES;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    Rows rows = rows_of<ROWS>(p);
    Sequence s = sequence_of(p, far, rows.b);
    end_rows<ROWS>(rows, s.length);
    Carve carve{shared_bytes};
    u16 *queries = carve.take<u16>(KEY_BYTES<ROWS>);
    u16 *of_keys = carve.take<u16>(2 * KEY_BYTES<OTHERS>), *of_values = carve.take<u16>(2 * VALUE_BYTES<OTHERS>);
    int first = first_key(p, s, rows), tiles = rows.last_token < first ? 0 : (rows.last_token - first) / OTHERS + 1;
    auto fetch_tile = [&](int tile) {
        int position = first + tile * OTHERS;
        Row none = {nullptr, 0};
        fetch_rows<HEAD_DIM, OTHERS>(keys_of(of_keys, tile), k, [&](int i) { return position + i <= rows.last_token ? key_row(p, s, k, ring, rows.b, position + i, rows.head) : none; });
        fetch_rows<VALUE_DIM, OTHERS>(values_of(of_values, tile), k, [&](int i) { return position + i <= rows.last_token ? value_row(p, s, v, ring, rows.b, position + i, rows.head) : none; });
    };
    if (tiles > 0) {
        fetch_rows<HEAD_DIM, ROWS>(queries, k, [&](int i) {
            int token = token_of(rows, i);
            return token <= rows.last_token ? query_row(p, q, rows.b, token, head_of(rows, i)) : Row{nullptr, 0};
        });
        fetch_tile(0);
    }
    float total[VALUE_STEPS * 2][4], peak[2] = {MASKED, MASKED}, sum[2] = {0.0f, 0.0f};
    clear(total);
#ifdef KEEP_QUERIES
    Left<Keys::terms> own[KEY_STEPS];
#endif
    int token[2];
    for (int r = 0; r < 2; r++) token[r] = token_of(rows, warp * 16 + lane / 4 + 8 * r);
    int warp_first = token_of(rows, warp * 16), warp_last = token_of(rows, warp * 16 + 15);
    for (int tile = 0; tile < tiles; tile++) {
        int position = first + tile * OTHERS;
        copies_done();
        if (tile == 0) clean<HEAD_DIM>(queries);
        clean<HEAD_DIM, OTHERS>(keys_of(of_keys, tile));
        clean<VALUE_DIM, OTHERS>(values_of(of_values, tile));
        barrier();
        if (tile + 1 < tiles) fetch_tile(tile + 1);
#ifdef KEEP_QUERIES
        if (tile == 0) {
#pragma unroll
            for (int k = 0; k < KEY_STEPS; k++) own[k] = left(Keys{queries}, warp * 16, k * 16);
        }
#endif
        // Nothing that the warp's rows see.
        if (position > warp_last || position + OTHERS <= warp_first + 1 - (int)p.window) continue;
        float logits[OTHERS / 8][4];
        clear(logits);
#ifdef KEEP_QUERIES
        add_products(logits, own, Keys{keys_of(of_keys, tile)});
#else
        add_products<KEY_STEPS>(logits, Keys{queries}, warp * 16, Keys{keys_of(of_keys, tile)});
#endif
        bool whole = position + OTHERS - 1 <= warp_first && position > warp_last - (int)p.window;
        float top[2] = {peak[0], peak[1]}, keep[2];
#pragma unroll
        for (int n = 0; n < OTHERS / 8; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                int r = c / 2, key = position + n * 8 + lane % 4 * 2 + c % 2;
                logits[n][c] = whole || sees(p, s, token[r], key) ? logits[n][c] * (p.scale * WINDOW_LOG2_E) : MASKED;
                top[r] = top[r] > logits[n][c] ? top[r] : logits[n][c];
            }
        }
#pragma unroll
        for (int r = 0; r < 2; r++) {
            for (int step = 1; step < 4; step <<= 1) {
                float other = from_lane(top[r], step);
                top[r] = top[r] > other ? top[r] : other;
            }
            keep[r] = exp2_fast(peak[r] - top[r]);
            peak[r] = top[r];
            sum[r] *= keep[r];
        }
#pragma unroll
        for (int n = 0; n < OTHERS / 8; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) {
                logits[n][c] = logits[n][c] > MASKED ? exp2_fast(logits[n][c] - peak[c / 2]) : 0.0f;
                sum[c / 2] += logits[n][c];
            }
        }
#pragma unroll
        for (int n = 0; n < VALUE_STEPS * 2; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) total[n][c] *= keep[c / 2];
        }
        add_weighted(total, logits, Values{values_of(of_values, tile)});
    }
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] = row_sum(sum[r]);
        int row = warp * 16 + lane / 4 + 8 * r, head = head_of(rows, row);
        float inverse = sum[r] > 0.0f ? quotient(1.0f, sum[r]) : 0.0f, gate = gates[head];
        i64 at = query_at(p, rows.b, token[r], head);
        bool exists = token[r] <= rows.last_token;
#ifdef HALVE
        float of_window = 0.0f, of_race = 0.0f;
        if (exists) {
            Row grad = grad_row(p, grad_o, rows.b, token[r], head);
#pragma unroll
            for (int n = 0; n < VALUE_STEPS * 2; n++) {
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int c = n * 8 + lane % 4 * 2 + i;
                    float g = load<GRAD_TYPE>(grad.from, grad.at + c);
                    of_window += g * (total[n][2 * r + i] * inverse);
                    of_race += g * load<RACE_TYPE>(race, at * VALUE_DIM + c);
                    store<RACE_TYPE>(half, at * VALUE_DIM + c, (1.0f - gate) * g);
                }
            }
        }
        of_window = row_sum(of_window);
        of_race = row_sum(of_race);
        if (lane % 4 == 0) {
            of_rows[row] = of_window - of_race;
            if (exists) kept[at] = {peak[r] + log2f(sum[r]), gate * of_window};
        }
#else
        if (token[r] >= (int)p.tokens) continue;
#pragma unroll
        for (int n = 0; n < VALUE_STEPS * 2; n++) {
#pragma unroll
            for (int i = 0; i < 2; i++) {
                int c = n * 8 + lane % 4 * 2 + i;
                // Rows after a sequence's end are zero.
                float x = exists ? gate * (total[n][2 * r + i] * inverse) + (1.0f - gate) * load<RACE_TYPE>(race, at * VALUE_DIM + c) : 0.0f;
                store<OUT_TYPE>(out, at * VALUE_DIM + c, x);
            }
        }
#endif
    }
#ifdef HALVE
    barrier();
    for (int h = threadIdx.x; h < GROUP; h += THREADS) {
        float share = 0.0f;
        for (int row = 0; row < ROWS; row++) {
            if ((rows.first + row) % GROUP == h) share += of_rows[row];
        }
        shares[((i64)rows.b * p.tiles + rows.first / ROWS) * Q_HEADS + rows.head * GROUP + h] = share;
    }
#endif
}
