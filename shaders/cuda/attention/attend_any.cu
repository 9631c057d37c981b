// The twin of attend.cu for every dtype and size, in f32: one block per (span of tokens, query head, row), one key per
// warp at a time, lanes side by side over the channels.
#include "partials.cuh"
#if SPARSE
#include "scoring.cuh"
#endif

#define WARPS 8
#define THREADS (WARPS * 32)
#define K_OWN ((HEAD_DIM + 31) / 32)
#define V_OWN ((VALUE_DIM + 31) / 32)

extern "C" __global__ void __launch_bounds__(THREADS, 4) attend_any(ARGUMENTS) {
    CALL;
    __shared__ float results[WARPS][VALUE_DIM + 2];
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 q_head = blockIdx.y, kv_head = q_head / GROUP;
    u32 row_index = p.first_row + blockIdx.z;
    Row row = p.rows[row_index];
    u32 first = blockIdx.x * p.span;
    wait_for_earlier();
    u64 index = (u64)row_index * Q_HEADS + q_head;
    if (first >= row.visible) {
        if (row.visible == 0 && blockIdx.x == 0) {
            for (u32 i = threadIdx.x; i < VALUE_DIM; i += THREADS) store_element<OUT_DTYPE>(p.o, index * VALUE_DIM + i, 0.0f);
            if (threadIdx.x == 0) store_lse(p, index, 0.0f, 0.0f);
        }
        return;
    }
    u32 end = min_u32(row.visible, first + p.span);
    i64 q_at = (row_index / p.tq) * p.q_strides.batch + (row_index % p.tq) * p.q_strides.token + (i64)q_head * p.q_strides.head;
    float query[K_OWN], values[V_OWN];
    float scale = p.scale * LOG2_E;
#pragma unroll
    for (u32 i = 0; i < K_OWN; i++) {
        u32 channel = i * 32 + lane;
        query[i] = channel < HEAD_DIM ? input_element<Q_DTYPE>(p.q, q_at + channel) * scale : 0.0f;
    }
#pragma unroll
    for (u32 i = 0; i < V_OWN; i++) values[i] = 0.0f;
    float peak = MASKED, sum = 0.0f;
#if SPARSE
    u32 head = kv_head * SCORE_ROWS + (SCORE_ROWS == 1 ? 0 : q_head % GROUP);
    u64 stride = ((u64)row.visible + 63) / 64 * 64;
    const u16* scores = p.scores + (u64)row.score_base * 64 + head * stride;
    u32 cut = p.cuts[(u64)blockIdx.z * KV_HEADS * SCORE_ROWS + head];
#endif
    // Warps take every WARPS-th run of 32 tokens.
    for (u32 base = first + warp * 32; base < end; base += WARPS * 32) {
        u32 mine = base + lane;
        bool wanted = mine < end;
#if SPARSE
        if (wanted && cut != CUT_ALL && !in_base(p, row, mine)) wanted = cut != CUT_NONE && is_selected(scores[mine], cut);
#endif
        u32 mask = __ballot_sync(FULL_WARP, wanted);
        while (mask != 0) {
            u32 token = base + __ffs(mask) - 1;
            mask &= mask - 1;
            u64 page = page_of(p, row.sequence, token);
            u64 keys = key_row(page, kv_head, token), rows = value_row(page, kv_head, token);
            float dot = 0.0f, value[V_OWN];
#pragma unroll
            for (u32 i = 0; i < K_OWN; i++)
                if (i * 32 + lane < HEAD_DIM) dot += query[i] * stored(keys, i * 32 + lane);
#pragma unroll
            for (u32 i = 0; i < V_OWN; i++) value[i] = i * 32 + lane < VALUE_DIM ? stored(rows, i * 32 + lane) : 0.0f;
            dot = warp_sum(dot);
            float top = fmaxf(peak, dot);
            float keep = exp2_fast(peak - top), weight = exp2_fast(dot - top);
            peak = top;
            sum = sum * keep + weight;
#pragma unroll
            for (u32 i = 0; i < V_OWN; i++) values[i] = values[i] * keep + weight * value[i];
        }
    }
    if (lane == 0) {
        results[warp][VALUE_DIM] = peak;
        results[warp][VALUE_DIM + 1] = sum;
    }
#pragma unroll
    for (u32 i = 0; i < V_OWN; i++)
        if (i * 32 + lane < VALUE_DIM) results[warp][i * 32 + lane] = values[i];
    __syncthreads();
    for (u32 channel = threadIdx.x; channel < VALUE_DIM; channel += THREADS) {
        float top = MASKED, total = 0.0f, value = 0.0f;
        for (u32 g = 0; g < WARPS; g++) top = fmaxf(top, results[g][VALUE_DIM]);
        for (u32 g = 0; g < WARPS; g++) {
            float part = results[g][VALUE_DIM + 1];
            float weight = part > 0.0f ? exp2_fast(results[g][VALUE_DIM] - top) : 0.0f;
            total += part * weight;
            value += results[g][channel] * weight;
        }
        if (row.part_count == 1) {
            store_element<OUT_DTYPE>(p.o, index * VALUE_DIM + channel, total > 0.0f ? divide(value, total) : 0.0f);
            if (channel == 0) store_lse(p, index, top, total);
        } else {
            float* part = p.partials + ((u64)row.part_base + (u64)q_head * row.part_count + blockIdx.x) * PART_STRIDE;
            part[4 + channel] = value;
            if (channel == 0) {
                part[0] = top;
                part[1] = total;
            }
        }
    }
    if (row.part_count > 1 && is_last(&p.arrivals[(u64)blockIdx.z * gridDim.y + blockIdx.y], row.part_count))
        merge_parts<THREADS, 8>(p, row, row_index, q_head, 1);
}
