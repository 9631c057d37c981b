// Exact attention of 64 query rows over their window: one block per (kv head, tile of rows, sequence). What it leaves is o
// mixed with RACE's, in the dtype asked for; or, with HALVE, what a backward pass goes on from: (1 − g)·grad_o, lse in base
// 2 and g·grad_o·o, and shares of the gates' gradients.
#include "window_tiles.cuh"

// Floats of a row of o in shared memory; rows whose loads are in flight at once.
#define OUT_PITCH (VALUE_DIM + 4)
#define AT_ONCE 8
#define ATTEND_BLOCKS (TERMS == 1 ? 3 : 2)

extern "C" __global__ void __launch_bounds__(THREADS, ATTEND_BLOCKS) window_attend(const Params p, const u32 *far, const u64 *seen, const float *gates, const void *q, const void *k,
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
    Sequence s = sequence_of(p, far, seen, rows.b);
    end_rows<ROWS>(rows, s.length);
    Carve carve{shared_bytes};
    u16 *queries = carve.take<u16>(KEY_BYTES<ROWS>);
    u16 *of_keys = carve.take<u16>(WINDOW_STAGES * KEY_BYTES<OTHERS>), *of_values = carve.take<u16>(WINDOW_STAGES * VALUE_BYTES<OTHERS>);
    int first = first_key(p, s, rows), tiles = rows.last_token < first ? 0 : (rows.last_token - first) / OTHERS + 1;
    auto fetch_tile = [&](int tile) { fetch_keys(p, s, rows, keys_of(of_keys, tile), values_of(of_values, tile), k, v, ring, first + tile * OTHERS); };
    if (tiles > 0) {
        fetch_rows<HEAD_DIM, ROWS>(queries, k, [&](int i) {
            int token = token_of(rows, i);
            return token <= rows.last_token ? query_row(p, q, rows.b, token, head_of(rows, i)) : Row{nullptr, 0};
        });
        for (int tile = 0; tile < WINDOW_STAGES - 1; tile++) {
            if (tile < tiles) fetch_tile(tile);
            copies_commit();
        }
    }
    float total[VALUE_STEPS * 2][4], peak[2] = {MASKED, MASKED}, sum[2] = {0.0f, 0.0f};
    clear(total);
    int token[2];
    for (int r = 0; r < 2; r++) token[r] = token_of(rows, warp * 16 + lane / 4 + 8 * r);
    int warp_first = token_of(rows, warp * 16), warp_last = token_of(rows, warp * 16 + 15);
    for (int tile = 0; tile < tiles; tile++) {
        int position = first + tile * OTHERS;
        next_tile(tile, tiles, fetch_tile, [&] {
            if (tile == 0) clean_rows<HEAD_DIM, ROWS>(queries);
            clean_rows<HEAD_DIM, OTHERS>(keys_of(of_keys, tile));
            clean_rows<VALUE_DIM, OTHERS>(values_of(of_values, tile));
        });
        // Nothing that the warp's rows see.
        if (position > warp_last || position + OTHERS <= warp_first + 1 - (int)p.window) continue;
        float logits[OTHERS / 8][4];
        clear(logits);
        add_products<KEY_STEPS>(logits, Keys<ROWS>{queries}, warp * 16, Keys<OTHERS>{keys_of(of_keys, tile)});
        float top[2] = {peak[0], peak[1]}, keep[2];
#pragma unroll
        for (int n = 0; n < OTHERS / 8; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) logits[n][c] *= p.scale * WINDOW_LOG2_E;
        }
        if (position + OTHERS - 1 > warp_first || position <= warp_last - (int)p.window) {
#pragma unroll
            for (int n = 0; n < OTHERS / 8; n++) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    if (!sees(p, s, token[c / 2], position + n * 8 + lane % 4 * 2 + c % 2)) logits[n][c] = MASKED;
                }
            }
        }
#pragma unroll
        for (int n = 0; n < OTHERS / 8; n++) {
#pragma unroll
            for (int c = 0; c < 4; c++) top[c / 2] = top[c / 2] > logits[n][c] ? top[c / 2] : logits[n][c];
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
        if (keep[0] != 1.0f || keep[1] != 1.0f) {
#pragma unroll
            for (int n = 0; n < VALUE_STEPS * 2; n++) {
#pragma unroll
                for (int c = 0; c < 4; c++) total[n][c] *= keep[c / 2];
            }
        }
        add_weighted(total, logits, Values<OTHERS>{values_of(of_values, tile)});
    }
    // By way of shared memory, for rows to be read and written whole; each warp keeps to its own.
    barrier();
    float *of_warp = (float *)shared_bytes + warp * 16 * OUT_PITCH;
#pragma unroll
    for (int r = 0; r < 2; r++) {
        sum[r] = row_sum(sum[r]);
        float inverse = sum[r] > 0.0f ? quotient(1.0f, sum[r]) : 0.0f;
#pragma unroll
        for (int n = 0; n < VALUE_STEPS * 2; n++) {
            float2 x = {total[n][2 * r] * inverse, total[n][2 * r + 1] * inverse};
            *(float2 *)(of_warp + (lane / 4 + 8 * r) * OUT_PITCH + n * 8 + lane % 4 * 2) = x;
        }
#ifdef HALVE
        // lse, beside the row.
        if (lane % 4 == 0) of_warp[(lane / 4 + 8 * r) * OUT_PITCH + VALUE_DIM] = peak[r] + log2f(sum[r]);
#endif
    }
    warp_barrier();
    bool inside = lane * 4 < VALUE_DIM;
#pragma unroll 1
    for (int first_row = 0; first_row < 16; first_row += AT_ONCE) {
        float of_race[AT_ONCE][4];
#ifdef HALVE
        float grad[AT_ONCE][4];
#endif
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int row = warp * 16 + first_row + i, at_token = token_of(rows, row), head = head_of(rows, row);
            if (!inside || at_token > rows.last_token) continue;
            load_four<RACE_TYPE>(of_race[i], race, query_at(p, rows.b, at_token, head) * VALUE_DIM + lane * 4);
#ifdef HALVE
            Row from = grad_row(p, grad_o, rows.b, at_token, head);
            load_four<GRAD_TYPE>(grad[i], from.from, from.at + lane * 4);
#endif
        }
#pragma unroll
        for (int i = 0; i < AT_ONCE; i++) {
            int row = warp * 16 + first_row + i, at_token = token_of(rows, row), head = head_of(rows, row);
            bool exists = at_token <= rows.last_token;
            i64 at = query_at(p, rows.b, at_token, head);
            float gate = gates[head], result[4] = {0.0f, 0.0f, 0.0f, 0.0f};
            const float *o = of_warp + (first_row + i) * OUT_PITCH;
#ifdef HALVE
            float dot_window = 0.0f, dot_race = 0.0f;
            if (inside && exists) {
#pragma unroll
                for (int c = 0; c < 4; c++) {
                    float g = finite_or_zero(grad[i][c]);
                    dot_window += g * o[lane * 4 + c];
                    dot_race += g * of_race[i][c];
                    result[c] = (1.0f - gate) * g;
                }
                store_four<RACE_TYPE>(half, at * VALUE_DIM + lane * 4, result);
            }
            dot_window = warp_sum(dot_window);
            dot_race = warp_sum(dot_race);
            if (lane == 0) {
                of_rows[row] = dot_window - dot_race;
                if (exists) kept[at] = float2{o[VALUE_DIM], gate * dot_window};
            }
#else
            // Rows after a sequence's end are zero.
            if (!inside || at_token >= (int)p.tokens) continue;
#pragma unroll
            for (int c = 0; c < 4; c++) {
                if (exists) result[c] = gate * o[lane * 4 + c] + (1.0f - gate) * of_race[i][c];
            }
            store_four<OUT_TYPE>(out, at * VALUE_DIM + lane * 4, result);
#endif
        }
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
