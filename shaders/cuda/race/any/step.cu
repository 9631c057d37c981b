// One token of each sequence: a block per (sequence, kv head, 32 channels) reads the sums and the tokens that wait (see
// pending.cuh), the new one among them, for all query heads of the group; the last block of a (sequence, kv head) to come
// counts it, and adds to A where the tokens that wait are many. Everything is summed in doubles, in which no centring is
// needed.
#include "pending.cuh"

// Query heads at a time.
constexpr int HEADS = GROUP < 4 ? GROUP : 4;
constexpr int WARPS = BLOCK / 32;
// Where one read of the sums is all, and a thread has room for its part, they are on their way while tokens are hashed.
constexpr bool EARLY = ENSEMBLES == 1 && GROUP <= HEADS && BUCKETS <= BLOCK / 2;
constexpr int OF_BUCKETS = EARLY ? (BUCKETS + WARPS - 1) / WARPS : 1, OF_TOKENS = (PENDING + WARPS - 1) / WARPS;
constexpr int OF_BITS = (PENDING * BITS + BLOCK - 1) / BLOCK;

// The Rust twin is `Step` in src/race/cuda/params.rs.
struct Step {
    i64 q_batch, q_head, k_batch, k_head, v_batch, v_head, planes_step;
    u32 kv_heads;
    float scale;
};

// 2βt of each bit of rows `first` to `end` of x.
__device__ __forceinline__ void hash_rows(float *to, const float *x, int first, int end, const float *planes, float beta) {
    int lane = threadIdx.x & 31;
    for (int i = first * BITS + (threadIdx.x >> 5); i < end * BITS; i += WARPS) {
        const float *w = planes + i % BITS * HEAD_DIM, *of_row = x + i / BITS * HEAD_DIM;
        float sum = 0.0f;
        for (int c = lane; c < HEAD_DIM; c += 32) sum += w[c] * of_row[c];
        for (int step = 16; step > 0; step >>= 1) sum += from_lane(sum, step);
        if (lane == 0) to[i] = 2.0f * beta * tanhf(sum);
    }
}

extern "C" __global__ void __launch_bounds__(BLOCK, EARLY ? 4 : 2) any_step(const Step p, const void *q, const void *k, const void *v, const float *planes, const float2 *heads,
                                    const u32 *lengths, double *state, float *records, void *out) {
    // Row 0 is the key, then come the queries.
    __shared__ float rows[(HEADS + 1) * HEAD_DIM];
    __shared__ float hashes[(HEADS + 1) * BITS];
    __shared__ float2 odds[HEADS * BITS];
    __shared__ float2 late[PENDING * BITS];
    __shared__ float weights[HEADS * BLOCK];
    // What each query gives to each token that waits.
    __shared__ float shares[HEADS * PENDING];
    __shared__ double parts[HEADS * BLOCK];
#ifdef RATIO
    __shared__ double masses[HEADS * WARPS];
#endif
    __shared__ u32 turn;
    int block = blockIdx.x % CHANNEL_BLOCKS, unit = blockIdx.x / CHANNEL_BLOCKS, head = unit % p.kv_heads, b = unit / p.kv_heads;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, channel = block * CHANNELS + lane;
    bool inside = channel < VALUE_DIM, live = !lengths || lengths[b] > 0;
    float beta = heads[head].x;
    float value = inside && live ? load<IN_TYPE>(v, b * p.v_batch + head * p.v_head + channel) : 0.0f;
    float *record = records + (i64)unit * RECORD;
    double early[OF_BUCKETS], early_mass = 0.0;
    float early_values[OF_TOKENS], early_bits[OF_BITS];
    if (EARLY && live) {
        const double *of_unit = state + (i64)unit * BUCKETS * COLUMNS;
#pragma unroll
        for (int i = 0; i < OF_BUCKETS; i++) {
            int s = warp + i * WARPS;
            early[i] = s < BUCKETS && inside ? of_unit[s * COLUMNS + channel] : 0.0;
        }
        if (threadIdx.x < BUCKETS) early_mass = of_unit[threadIdx.x * COLUMNS + VALUE_DIM];
        // Whether they wait is not known yet.
#pragma unroll
        for (int i = 0; i < OF_TOKENS; i++) early_values[i] = warp + i * WARPS < PENDING && inside ? waiting(record, warp + i * WARPS)[BITS + channel] : 0.0f;
#pragma unroll
        for (int i = 0; i < OF_BITS; i++) {
            int at = threadIdx.x + i * BLOCK;
            early_bits[i] = at < PENDING * BITS ? waiting(record, at / BITS)[at % BITS] : 0.0f;
        }
    }
    // Tokens that wait before this one, which takes its place after them.
    int count = live ? (int)bits_of(record[0]) : 0;

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
            double sums[HEADS] = {};
#ifdef RATIO
            double found[HEADS] = {};
#endif
            barrier();
            hash_rows(hashes, rows, 0, HEADS + 1, planes + head * p.planes_step + ensemble * BITS * HEAD_DIM, beta);
            if (EARLY) {
#pragma unroll
                for (int i = 0; i < OF_BITS; i++) {
                    if ((int)threadIdx.x + i * BLOCK < count * BITS) late[threadIdx.x + i * BLOCK] = odds_of(early_bits[i]);
                }
            } else {
                for (int i = threadIdx.x; i < count * BITS; i += BLOCK) late[i] = odds_of(waiting(record, i / BITS)[ensemble * BITS + i % BITS]);
            }
            for (int i = threadIdx.x; i < HEADS * PENDING; i += BLOCK) shares[i] = 0.0f;
            barrier();
            for (int i = threadIdx.x; i < (HEADS + 1) * BITS; i += BLOCK) {
                float2 pair = odds_of(hashes[i]);
                if (i < BITS) late[count * BITS + i] = pair;
                else odds[i - BITS] = pair;
            }
            for (int base = 0; base < BUCKETS; base += BLOCK) {
                int bucket = base + threadIdx.x, end = BUCKETS - base < BLOCK ? BUCKETS - base : BLOCK;
                double mass = EARLY ? early_mass : bucket < BUCKETS ? of_unit[bucket * COLUMNS + VALUE_DIM] : 0.0;
                barrier();
                if (bucket < BUCKETS) {
#ifndef RATIO
                    for (int i = 0; i <= count; i++) mass += phi_of(late + i * BITS, bucket);
#endif
                    for (int h = 0; h < HEADS; h++) {
                        float phi = phi_of(odds + h * BITS, bucket);
#ifdef RATIO
                        found[h] += (double)phi * mass;
#else
                        phi = (float)(phi / (mass + 1e-6));
#endif
                        weights[h * BLOCK + threadIdx.x] = phi;
                    }
                }
                barrier();
                if (EARLY) {
#pragma unroll
                    for (int i = 0; i < OF_BUCKETS; i++) {
                        int s = warp + i * WARPS;
                        for (int h = 0; s < BUCKETS && h < HEADS; h++) sums[h] += weights[h * BLOCK + s] * early[i];
                    }
                } else for (int s = warp; s < end && inside; s += WARPS) {
                    double x = of_unit[(base + s) * COLUMNS + channel];
                    for (int h = 0; h < HEADS; h++) sums[h] += weights[h * BLOCK + s] * x;
                }
                for (int i = warp; i < HEADS * (count + 1); i += WARPS) {
                    int h = i / (count + 1), token = i % (count + 1);
                    float sum = 0.0f;
                    for (int s = lane; s < end; s += 32) sum += weights[h * BLOCK + s] * phi_of(late + token * BITS, base + s);
                    for (int step = 16; step > 0; step >>= 1) sum += from_lane(sum, step);
                    if (lane == 0) shares[h * PENDING + token] += sum;
                }
            }
#ifdef RATIO
            for (int h = 0; h < HEADS; h++) {
                double mass = found[h];
                for (int step = 16; step > 0; step >>= 1) mass += from_lane(mass, step);
                if (lane == 0) masses[h * WARPS + warp] = mass;
            }
#endif
            barrier();
            // Each warp has some of the tokens that wait.
#pragma unroll
            for (int n = 0; n < OF_TOKENS; n++) {
                int i = warp + n * WARPS;
                if (i > count) continue;
                float x = i == count ? value : EARLY ? early_values[n] : inside ? waiting(record, i)[ENSEMBLES * BITS + channel] : 0.0f;
                for (int h = 0; h < HEADS; h++) sums[h] += (double)shares[h * PENDING + i] * x;
            }
            for (int h = 0; h < HEADS; h++) parts[h * BLOCK + threadIdx.x] = sums[h];
            barrier();
            if (warp == 0) {
                for (int h = 0; h < HEADS; h++) {
                    double divisor = 1.0, sum = 0.0;
#ifdef RATIO
                    divisor = 0.0;
                    for (int i = 0; i < WARPS; i++) divisor += masses[h * WARPS + i];
                    for (int i = 0; i <= count; i++) divisor += shares[h * PENDING + i];
#endif
                    for (int i = 0; i < WARPS; i++) sum += parts[h * BLOCK + i * 32 + lane];
                    result[h] += divisor > 0.0 ? sum / divisor * p.scale : 0.0;
                }
            }
        }
        if (warp == 0 && inside) {
            for (int h = 0; h < HEADS; h++) {
                if (first + h < GROUP) store<OUT_TYPE>(out, ((i64)unit * GROUP + first + h) * VALUE_DIM + channel, (float)(result[h] / ENSEMBLES));
            }
        }
    }
    if (!live) return;
    bool full = count + 1 == PENDING;
    if (!full && warp == 0 && inside) record[HEADER + count * TOKEN + ENSEMBLES * BITS + channel] = value;
    // All reads of A and of the count are done when all blocks have been counted.
    barrier();
    if (threadIdx.x == 0) turn = count_up((u32 *)record + 1);
    barrier();
    bool last = turn == CHANNEL_BLOCKS - 1;
    if (!full && !last) return;
    float values[PENDING];
    if (full) {
        for (int i = 0; i < PENDING - 1; i++) values[i] = inside ? waiting(record, i)[ENSEMBLES * BITS + channel] : 0.0f;
        values[PENDING - 1] = value;
    }
    for (int ensemble = 0; ensemble < ENSEMBLES; ensemble++) {
        if (ENSEMBLES > 1) {
            // The hashes at hand are those of the last.
            barrier();
            hash_rows(hashes, rows, 0, 1, planes + head * p.planes_step + ensemble * BITS * HEAD_DIM, beta);
            for (int i = threadIdx.x; full && i < count * BITS; i += BLOCK) late[i] = odds_of(waiting(record, i / BITS)[ensemble * BITS + i % BITS]);
            barrier();
            for (int i = threadIdx.x; i < BITS; i += BLOCK) late[count * BITS + i] = odds_of(hashes[i]);
            barrier();
        }
        double *of_unit = state + (i64)(unit * ENSEMBLES + ensemble) * BUCKETS * COLUMNS;
        if (full) fold_values(of_unit, late, values, PENDING, channel);
        if (full && last) fold_masses(of_unit, late, PENDING);
        for (int i = threadIdx.x; !full && i < BITS; i += BLOCK) record[HEADER + count * TOKEN + ensemble * BITS + i] = hashes[i];
    }
    if (last && threadIdx.x == 0) {
        record[1] = float_of(0u);
        record[0] = float_of(full ? 0u : (u32)(count + 1));
    }
}
