// One token of each sequence: a block per (sequence, kv head), whose warps share the keys and merge at the end; then the
// token's key and value take their slot of the ring, which no query of the call sees as it was.
#include "window.cuh"

#define BLOCK 256
#define WARPS (BLOCK / 32)
// Keys that a warp has in flight.
#define AHEAD (HEAD_DIM + VALUE_DIM <= 256 ? 8 : 1)

constexpr int OWN = (HEAD_DIM + 31) / 32;
constexpr int OWN_VALUES = (VALUE_DIM + 31) / 32;
// Query heads at a time.
constexpr int HEADS = GROUP < 4 ? GROUP : 4;

extern "C" __global__ void __launch_bounds__(BLOCK, 1) window_step(const Params p, const u32 *far, u64 *seen, const float *gates, const void *q, const void *k, const void *v,
                                                                void *ring, const void *race, void *out) {
    __shared__ float peaks[WARPS][HEADS], sums[WARPS][HEADS], parts[WARPS][VALUE_DIM];
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, head = blockIdx.x % KV_HEADS, b = blockIdx.x / KV_HEADS;
    Sequence s = sequence_of(p, far, seen + head, b);
    int keys = s.length > 0 ? (int)s.past + 1 : 0;
    for (int first = 0; first < GROUP; first += HEADS) {
        float query[HEADS][OWN], total[HEADS][OWN_VALUES], peak[HEADS], sum[HEADS];
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            peak[h] = MASKED;
            sum[h] = 0.0f;
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                int c = i * 32 + lane;
                query[h][i] = c < HEAD_DIM && first + h < GROUP ? load<IN_TYPE>(q, b * p.q_batch + (head * GROUP + first + h) * p.q_head + c) : 0.0f;
            }
#pragma unroll
            for (int i = 0; i < OWN_VALUES; i++) total[h][i] = 0.0f;
        }
        for (int key = warp; key < keys; key += WARPS * AHEAD) {
            float of_key[AHEAD][OWN], of_value[AHEAD][OWN_VALUES];
#pragma unroll
            for (int a = 0; a < AHEAD; a++) {
                int position = key + a * WARPS < keys ? key + a * WARPS - (int)s.past : 0;
                Row at = key_row(p, s, k, ring, b, position, head);
#pragma unroll
                for (int i = 0; i < OWN; i++) of_key[a][i] = i * 32 + lane < HEAD_DIM ? load<IN_TYPE>(at.from, at.at + i * 32 + lane) : 0.0f;
                at = value_row(p, s, v, ring, b, position, head);
#pragma unroll
                for (int i = 0; i < OWN_VALUES; i++) of_value[a][i] = i * 32 + lane < VALUE_DIM ? load<IN_TYPE>(at.from, at.at + i * 32 + lane) : 0.0f;
            }
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                // Keys that there are not get no weight.
                float logits[AHEAD], top = peak[h];
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    logits[a] = 0.0f;
#pragma unroll
                    for (int i = 0; i < OWN; i++) logits[a] += query[h][i] * of_key[a][i];
                }
                for (int step = 16; step > 0; step >>= 1) {
#pragma unroll
                    for (int a = 0; a < AHEAD; a++) logits[a] += from_lane(logits[a], step);
                }
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    logits[a] = key + a * WARPS < keys ? logits[a] * (p.scale * WINDOW_LOG2_E) : MASKED;
                    top = top > logits[a] ? top : logits[a];
                }
                float keep = exp2f(peak[h] - top);
                peak[h] = top;
                sum[h] *= keep;
#pragma unroll
                for (int i = 0; i < OWN_VALUES; i++) total[h][i] *= keep;
#pragma unroll
                for (int a = 0; a < AHEAD; a++) {
                    float weight = logits[a] > MASKED ? exp2f(logits[a] - top) : 0.0f;
                    sum[h] += weight;
#pragma unroll
                    for (int i = 0; i < OWN_VALUES; i++) total[h][i] += weight * of_value[a][i];
                }
            }
        }
        barrier();
        if (lane == 0) {
#pragma unroll
            for (int h = 0; h < HEADS; h++) {
                peaks[warp][h] = peak[h];
                sums[warp][h] = sum[h];
            }
        }
        barrier();
#pragma unroll
        for (int h = 0; h < HEADS; h++) {
            float top = MASKED, whole = 0.0f;
            for (int w = 0; w < WARPS; w++) top = peaks[w][h] > top ? peaks[w][h] : top;
            for (int w = 0; w < WARPS; w++) whole += sums[w][h] * exp2f(peaks[w][h] - top);
            float share = whole > 0.0f ? exp2f(peak[h] - top) / whole : 0.0f;
            barrier();
#pragma unroll
            for (int i = 0; i < OWN_VALUES; i++) {
                if (i * 32 + lane < VALUE_DIM) parts[warp][i * 32 + lane] = total[h][i] * share;
            }
            barrier();
            if (first + h >= GROUP) continue;
            int q_head = head * GROUP + first + h;
            i64 at = query_at(p, b, 0, q_head) * VALUE_DIM;
            for (int c = threadIdx.x; c < VALUE_DIM; c += BLOCK) {
                float x = 0.0f;
                for (int w = 0; w < WARPS; w++) x += parts[w][c];
                x = gates[q_head] * x + (1.0f - gates[q_head]) * load<RACE_TYPE>(race, at + c);
                store<OUT_TYPE>(out, at + c, keys > 0 ? x : 0.0f);
            }
        }
    }
    if (keys == 0) return;
    // Nobody else reads this count.
    barrier();
    if (threadIdx.x == 0) seen[(i64)b * KV_HEADS + head]++;
    i64 to = ring_row(p, s, b, 0, head);
    for (int c = threadIdx.x; c < HEAD_DIM + VALUE_DIM; c += BLOCK) {
        float x = c < HEAD_DIM ? load<IN_TYPE>(k, b * p.k_batch + head * p.k_head + c) : load<IN_TYPE>(v, b * p.v_batch + head * p.v_head + c - HEAD_DIM);
        store<IN_TYPE>(ring, to + c, x);
    }
}
