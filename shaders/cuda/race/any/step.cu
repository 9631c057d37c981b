// One token of each sequence: a block per (sequence, kv head, 32 channels) takes the key into B's columns of these
// channels and reads them for all query heads of the group; the last block of a (sequence, kv head) to come adds to A,
// which all of them read as it was. Everything is summed in doubles, in which no centring is needed.
#include "any.cuh"

#define CHANNELS 32
constexpr int CHANNEL_BLOCKS = (VALUE_DIM + CHANNELS - 1) / CHANNELS;
// Query heads at a time.
constexpr int HEADS = GROUP < 4 ? GROUP : 4;

// The Rust twin is `Step` in src/race/cuda/params.rs.
struct Step {
    i64 q_batch, q_head, k_batch, k_head, v_batch, v_head, planes_step;
    u32 kv_heads;
    float scale;
};

// Hashes `rows` rows of x: twice (σ(−2βt), σ(2βt)) of each bit.
__device__ __forceinline__ void hash_rows(float2 *odds, const float *x, int rows, const float *planes, float beta) {
    int lane = threadIdx.x & 31;
    for (int i = threadIdx.x >> 5; i < rows * BITS; i += BLOCK / 32) {
        const float *w = planes + i % BITS * HEAD_DIM, *of_row = x + i / BITS * HEAD_DIM;
        float sum = 0.0f;
        for (int c = lane; c < HEAD_DIM; c += 32) sum += w[c] * of_row[c];
        for (int step = 16; step > 0; step >>= 1) sum += from_lane(sum, step);
        float z = 2.0f * beta * tanhf(sum), e = expf(-fabsf(z)), large = 1.0f / (1.0f + e), small = e * large;
        float2 pair = {z > 0.0f ? small : large, z > 0.0f ? large : small};
        if (lane == 0) odds[i] = pair;
    }
}

__device__ __forceinline__ float phi_of(const float2 *odds, int bucket) {
    float weight = 1.0f;
    for (int plane = 0; plane < PLANES; plane++) {
        float2 pair = odds[bucket / RADIX * PLANES + plane];
        weight *= (bucket >> (PLANES - 1 - plane)) & 1 ? pair.y : pair.x;
    }
    return weight;
}

extern "C" __global__ void __launch_bounds__(BLOCK) any_step(const Step p, const void *q, const void *k, const void *v, const float *planes, const float2 *heads,
                                    const u32 *lengths, double *state, u32 *counters, void *out) {
    __shared__ float rows[(HEADS + 1) * HEAD_DIM];
    __shared__ float2 odds[(HEADS + 1) * BITS];
    __shared__ float weights[(HEADS + 1) * BLOCK];
    __shared__ double parts[BLOCK];
    __shared__ u32 turn;
    int block = blockIdx.x % CHANNEL_BLOCKS, unit = blockIdx.x / CHANNEL_BLOCKS, head = unit % p.kv_heads, b = unit / p.kv_heads;
    int lane = threadIdx.x & 31, row8 = threadIdx.x >> 5, channel = block * CHANNELS + lane;
    bool inside = channel < VALUE_DIM, live = !lengths || lengths[b] > 0;
    float beta = heads[head].x;
    double value = inside && live ? (double)load<IN_TYPE>(v, b * p.v_batch + head * p.v_head + channel) : 0.0;

    for (int first = 0; first < GROUP; first += HEADS) {
        double result[HEADS];
        for (int h = 0; h < HEADS; h++) result[h] = 0.0;
        barrier();
        for (int i = threadIdx.x; live && i < (HEADS + 1) * HEAD_DIM; i += BLOCK) {
            int h = i / HEAD_DIM, c = i % HEAD_DIM, q_head = first + h - 1 < GROUP ? first + h - 1 : GROUP - 1;
            rows[i] = h == 0 ? load<IN_TYPE>(k, b * p.k_batch + head * p.k_head + c)
                             : load<IN_TYPE>(q, b * p.q_batch + (head * GROUP + q_head) * p.q_head + c);
        }
        for (int ensemble = 0; live && ensemble < ENSEMBLES; ensemble++) {
            double *of_unit = state + (i64)(unit * ENSEMBLES + ensemble) * BUCKETS * COLUMNS;
            double sums[HEADS];
            for (int h = 0; h < HEADS; h++) sums[h] = 0.0;
#ifdef RATIO
            double masses[HEADS];
            for (int h = 0; h < HEADS; h++) masses[h] = 0.0;
#endif
            barrier();
            hash_rows(odds, rows, HEADS + 1, planes + head * p.planes_step + ensemble * BITS * HEAD_DIM, beta);
            for (int base = 0; base < BUCKETS; base += BLOCK) {
                barrier();
                int bucket = base + threadIdx.x;
                if (bucket < BUCKETS) {
                    double mass = of_unit[bucket * COLUMNS + VALUE_DIM];
                    for (int h = 0; h <= HEADS; h++) {
                        float phi = phi_of(odds + h * BITS, bucket);
                        if (h == 0) mass += phi;
#ifdef RATIO
                        else masses[h - 1] += (double)phi * mass;
#else
                        else phi = (float)(phi / (mass + 1e-6));
#endif
                        weights[h * BLOCK + threadIdx.x] = phi;
                    }
                }
                barrier();
                int end = BUCKETS - base < BLOCK ? BUCKETS - base : BLOCK;
                for (int s = row8; s < end && inside; s += BLOCK / 32) {
                    double *at = of_unit + (base + s) * COLUMNS + channel, x = *at;
                    if (first == 0) {
                        x += weights[s] * value;
                        *at = x;
                    }
                    for (int h = 0; h < HEADS; h++) sums[h] += weights[(h + 1) * BLOCK + s] * x;
                }
            }
            for (int h = 0; h < HEADS; h++) {
                double divisor = 1.0;
#ifdef RATIO
                barrier();
                parts[threadIdx.x] = masses[h];
                barrier();
                for (int step = BLOCK / 2; step > 0; step >>= 1) {
                    if ((int)threadIdx.x < step) parts[threadIdx.x] += parts[threadIdx.x + step];
                    barrier();
                }
                divisor = parts[0];
#endif
                barrier();
                parts[threadIdx.x] = sums[h];
                barrier();
                double sum = 0.0;
                for (int i = 0; i < BLOCK / 32; i++) sum += parts[i * 32 + lane];
                result[h] += divisor > 0.0 ? sum / divisor * p.scale : 0.0;
            }
        }
        if (row8 == 0 && inside) {
            for (int h = 0; h < HEADS; h++) {
                if (first + h < GROUP) store<OUT_TYPE>(out, ((i64)unit * GROUP + first + h) * VALUE_DIM + channel, (float)(result[h] / ENSEMBLES));
            }
        }
    }
    if (!live) return;
    // All reads of A are done when all blocks have been counted.
    barrier();
    if (threadIdx.x == 0) turn = count_up(counters + unit);
    barrier();
    if (turn != CHANNEL_BLOCKS - 1) return;
    for (int ensemble = 0; ensemble < ENSEMBLES; ensemble++) {
        barrier();
        hash_rows(odds, rows, 1, planes + head * p.planes_step + ensemble * BITS * HEAD_DIM, beta);
        barrier();
        double *of_unit = state + (i64)(unit * ENSEMBLES + ensemble) * BUCKETS * COLUMNS;
        for (int s = threadIdx.x; s < BUCKETS; s += BLOCK) of_unit[s * COLUMNS + VALUE_DIM] += phi_of(odds, s);
    }
    if (threadIdx.x == 0) counters[unit] = 0;
}
