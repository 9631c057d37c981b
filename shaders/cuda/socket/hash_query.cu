// A query's side of scoring: one block per (some tables, kv head, row), for all scoring heads of the kv head. Eight
// warps share the channels of a projection, one lane per plane. Also clears the row's histogram.
#include "scoring.cuh"

#define THREADS 256
#define WARPS 8
#define PASS (SCORING_HEADS < 8 ? SCORING_HEADS : 8)
#define WARP_CHANNELS ((HEAD_DIM + WARPS - 1) / WARPS)
#define BLOCK_PLANES (QUERY_TABLES * PLANES)

__device__ __forceinline__ float query_channel(const Call& p, i64 at, u32 head, u32 channel) {
    return input_element<Q_DTYPE>(p.q, at + head * p.q_strides.head + channel);
}

// 1 / ‖q‖ of one head, by a warp.
__device__ float inverse_norm(const Call& p, i64 at, u32 head, u32 lane) {
    float square = 0.0f;
    for (u32 c = lane; c < HEAD_DIM; c += 32) {
        float x = query_channel(p, at, head, c);
        square += x * x;
    }
    square = warp_sum(square);
    return square > 0.0f ? 1.0f / sqrtf(square) : 0.0f;
}

__device__ __forceinline__ float logistic(float t) { return 1.0f / (1.0f + expf(-t)); }

extern "C" __global__ void __launch_bounds__(THREADS) hash_query(ARGUMENTS) {
    CALL;
    __shared__ float x[PASS][HEAD_DIM];
    __shared__ float parts[WARPS][PASS][32];
    __shared__ float u[PASS][32];
    // What bit 0 and bit 1 of a plane contribute.
    __shared__ float sides[PASS][32][2];
#if NORMALIZE
    __shared__ float norms[GROUP];
#endif
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 kv_head = blockIdx.y, block_row = blockIdx.z;
    u32 row_index = p.first_row + block_row;
    u32 first_plane = blockIdx.x * BLOCK_PLANES;
    const float* planes = p.planes + (p.planes_stride > 0 ? (u64)kv_head * p.planes_stride : 0);
    i64 q_at = (row_index / p.tq) * p.q_strides.batch + (row_index % p.tq) * p.q_strides.token
        + (i64)(kv_head * GROUP) * p.q_strides.head;
    // Planes do not depend on what runs before; the query may.
    float w[WARP_CHANNELS];
    if (HEAD_DIM <= 256) {
#pragma unroll
        for (u32 i = 0; i < WARP_CHANNELS; i++) {
            u32 channel = warp * WARP_CHANNELS + i, plane = first_plane + lane;
            bool inside = channel < HEAD_DIM && lane < BLOCK_PLANES && plane < BITS;
            w[i] = inside ? __ldg(&planes[(u64)channel * BITS + plane]) : 0.0f;
        }
    }
    wait_for_earlier();
    let_later_start();
    {
        u64 first = (u64)(block_row * KV_HEADS + kv_head) * SCORE_ROWS * (BINS + 1);
        for (u32 i = blockIdx.x * THREADS + threadIdx.x; i < SCORE_ROWS * (BINS + 1); i += QUERY_BLOCKS * THREADS)
            p.histogram[first + i] = 0;
    }
#if NORMALIZE
    for (u32 g = warp; g < GROUP; g += WARPS) {
        float norm = inverse_norm(p, q_at, g, lane);
        if (lane == 0) norms[g] = norm;
    }
    __syncthreads();
#endif
    for (u32 first_head = 0; first_head < SCORING_HEADS; first_head += PASS) {
        u32 heads = min_u32(PASS, SCORING_HEADS - first_head);
        for (u32 i = threadIdx.x; i < heads * HEAD_DIM; i += THREADS) {
            u32 h = i / HEAD_DIM, c = i % HEAD_DIM;
#if MEAN_QUERY
            float sum = 0.0f;
            for (u32 g = 0; g < GROUP; g++) {
                float value = query_channel(p, q_at, g, c);
#if NORMALIZE
                value *= norms[g];
#endif
                sum += value;
            }
            x[h][c] = sum * (1.0f / GROUP);
#else
            float value = query_channel(p, q_at, first_head + h, c);
#if NORMALIZE
            value *= norms[first_head + h];
#endif
            x[h][c] = value;
#endif
        }
        __syncthreads();
        float sums[PASS];
#pragma unroll
        for (u32 h = 0; h < PASS; h++) sums[h] = 0.0f;
        if (HEAD_DIM <= 256) {
#pragma unroll
            for (u32 i = 0; i < WARP_CHANNELS; i++) {
                u32 channel = min_u32(warp * WARP_CHANNELS + i, HEAD_DIM - 1);
#pragma unroll
                for (u32 h = 0; h < PASS; h++) sums[h] += x[h][channel] * w[i];
            }
        } else {
            for (u32 i = 0; i < WARP_CHANNELS; i++) {
                u32 channel = warp * WARP_CHANNELS + i, plane = first_plane + lane;
                if (channel >= HEAD_DIM || lane >= BLOCK_PLANES || plane >= BITS) continue;
                float weight = __ldg(&planes[(u64)channel * BITS + plane]);
#pragma unroll
                for (u32 h = 0; h < PASS; h++) sums[h] += x[h][channel] * weight;
            }
        }
#pragma unroll
        for (u32 h = 0; h < PASS; h++) parts[warp][h][lane] = sums[h];
        __syncthreads();
        for (u32 i = threadIdx.x; i < heads * 32; i += THREADS) {
            u32 h = i / 32, plane = i % 32;
            float sum = 0.0f;
            for (u32 part = 0; part < WARPS; part++) sum += parts[part][h][plane];
            u[h][plane] = sum;
#if SCORING == SOFT_COLLISION
            float t = 2.0f * p.beta * tanhf(sum);
            sides[h][plane][0] = logistic(-t);
            sides[h][plane][1] = logistic(t);
#elif SCORING == SIGN_PROJECTION
            sides[h][plane][0] = -sum * p.scale;
            sides[h][plane][1] = sum * p.scale;
#else
            sides[h][plane][0] = sum >= 0.0f ? 0.0f : 1.0f;
            sides[h][plane][1] = sum >= 0.0f ? 1.0f : 0.0f;
#endif
        }
        __syncthreads();
        u64 table_row = (u64)(block_row * KV_HEADS + kv_head) * SCORING_HEADS + first_head;
        u32 first_table = blockIdx.x * QUERY_TABLES;
        u32 tables = min_u32(QUERY_TABLES, TABLES - first_table);
        for (u32 i = threadIdx.x; i < heads * tables * DIGITS * 16; i += THREADS) {
            u32 value = i % 16, digit = i / 16 % DIGITS;
            u32 table = i / (16 * DIGITS) % tables, h = i / (16 * DIGITS * tables);
            u32 bits = min_u32(4, PLANES - digit * 4);
            float entry = PRODUCT ? 1.0f : 0.0f;
            for (u32 b = 0; b < bits; b++) {
                // Bit b of digit d is bit 4d + b of the code, whose most significant bit is plane 0.
                float side = sides[h][table * PLANES + PLANES - 1 - digit * 4 - b][value >> b & 1u];
                entry = PRODUCT ? entry * side : entry + side;
            }
            p.tables[(table_row + h) * TABLE_ROW + (first_table * DIGITS + i % (16 * DIGITS * tables) / 16) * 16 + value] = entry;
        }
        // One warp per head: projections, and the largest sum that any key could have from these tables.
        if (warp < heads) {
            float* out = p.tables + (table_row + warp) * TABLE_ROW;
            if (lane < tables * PLANES) out[AT_PROJECTIONS + first_plane + lane] = u[warp][lane] * p.scale;
            float best = 0.0f;
            if (lane < tables) {
                best = PRODUCT ? 1.0f : 0.0f;
                for (u32 plane = 0; plane < PLANES; plane++) {
                    const float* side = sides[warp][lane * PLANES + plane];
                    float larger = fmaxf(side[0], side[1]);
                    best = PRODUCT ? best * larger : best + larger;
                }
            }
            best = warp_sum(best);
            float shift = 0.0f;
#if SCORING == SIGN_PROJECTION && CENTER
            if (blockIdx.x == 0) {
                const u32* mean = p.state + (u64)p.rows[row_index].slot * SLOT_WORDS + kv_head * HEAD_DIM;
                for (u32 c = lane; c < HEAD_DIM; c += 32) shift += x[warp][c] * bits_float(mean[c]);
                shift = warp_sum(shift) * p.scale;
            }
#endif
            if (lane == 0) {
                out[AT_BOUNDS + blockIdx.x] = best;
                if (blockIdx.x == 0) out[AT_SHIFT] = shift;
            }
        }
        __syncthreads();
    }
}
