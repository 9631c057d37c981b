// One token of each sequence: a block per (sequence, kv head, CHANNELS channels) reads the sums and the tokens that wait
// (see pending.cuh), the new one among them, for all query heads of the group; the last block of a (sequence, kv head) to
// come counts it, and adds to A where the tokens that wait are many. Of the sums, which need no centring here, the high
// parts are read, and summed in doubles (four at a time in floats).
#include "pending.cuh"

// Query heads at a time.
constexpr int HEADS = GROUP < 4 ? GROUP : 4;
constexpr int WARPS = BLOCK / 32;
// Buckets that a thread reads before it uses them, and that a block does.
constexpr int EACH = (BUCKETS + STRANDS - 1) / STRANDS, MOST = HEADS == 1 ? 32 : 16, OWN = EACH < MOST ? EACH : MOST;
constexpr int SLAB = OWN * STRANDS;
#ifdef RATIO
constexpr int MASSES = (SLAB + 31) / 32;
#endif
constexpr int OF_TOKENS = (PENDING + STRANDS - 1) / STRANDS, OF_BITS = (PENDING * BITS + BLOCK - 1) / BLOCK;

// The Rust twin is `Step` in src/race/cuda/params.rs.
struct Step {
    i64 q_batch, q_head, k_batch, k_head, v_batch, v_head, planes_step;
    u32 kv_heads;
    float scale;
};

// The products of the first ROWS rows of x with the planes of all bits, which are read once: a warp has a bit.
template <int ROWS> __device__ __forceinline__ void project_rows(float *to, const float *x, const float *planes) {
    // Channels that are read at once.
    constexpr int WIDE = HEAD_DIM % 4 == 0 ? 4 : 1;
    int lane = threadIdx.x & 31;
#pragma unroll 2
    for (int bit = threadIdx.x >> 5; bit < BITS; bit += WARPS) {
        float sums[ROWS] = {};
#pragma unroll
        for (int c = lane * WIDE; c < HEAD_DIM; c += 32 * WIDE) {
            float w[WIDE];
            const float *from = planes + bit * HEAD_DIM + c;
            if constexpr (WIDE == 4) {
                float4 four = *(const float4 *)from;
                w[0] = four.x, w[1] = four.y, w[2] = four.z, w[3] = four.w;
            } else {
                w[0] = from[0];
            }
            for (int row = 0; row < ROWS; row++) {
                for (int i = 0; i < WIDE; i++) sums[row] += w[i] * x[row * HEAD_DIM + c + i];
            }
        }
        for (int row = 0; row < ROWS; row++) {
            for (int step = 16; step > 0; step >>= 1) sums[row] += from_lane(sums[row], step);
            if (lane == 0) to[row * BITS + bit] = sums[row];
        }
    }
}

__device__ __forceinline__ float logit_of(float product, float beta) { return 2.0f * beta * tanhf(product); }

#ifdef RATIO
// Σ φ(a)·φ(b) over all buckets: of each table a product, as its weights are.
__device__ __forceinline__ float overlap(const float2 *a, const float2 *b) {
    float sum = 0.0f;
    for (int table = 0; table < TABLES; table++) {
        float weight = 1.0f;
#pragma unroll
        for (int bit = table * PLANES; bit < (table + 1) * PLANES; bit++) {
            float2 x = a[bit], y = b[bit];
            weight *= x.x * y.x + x.y * y.y;
        }
        sum += weight;
    }
    return sum;
}
#endif

extern "C" __global__ void __launch_bounds__(BLOCK, HEADS == 1 ? 4 : 2) any_step(const Step p, const void *q, const void *k, const void *v, const float *planes, const float2 *heads,
                                    const u32 *lengths, float *state, float *records, void *out) {
    // Row 0 is the key, then come the queries.
    __shared__ __align__(16) float rows[(HEADS + 1) * HEAD_DIM];
    __shared__ float hashes[(HEADS + 1) * BITS];
    __shared__ float2 odds[HEADS * BITS];
    __shared__ float2 late[PENDING * BITS];
    __shared__ __align__(16) float weights[HEADS * SLAB];
    __shared__ __align__(16) float phis[FOLD * PENDING];
    // What each query gives to each token that waits.
    __shared__ float shares[HEADS * PENDING];
    __shared__ double parts[HEADS * BLOCK];
#ifdef RATIO
    __shared__ double masses[HEADS * MASSES];
#endif
    __shared__ u32 turn;
    int block = blockIdx.x % CHANNEL_BLOCKS, unit = blockIdx.x / CHANNEL_BLOCKS, head = unit % p.kv_heads, b = unit / p.kv_heads;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, strand = threadIdx.x / CHANNELS;
    int channel = block * CHANNELS + threadIdx.x % CHANNELS;
    bool inside = channel < VALUE_DIM, live = !lengths || lengths[b] > 0;
    float beta = heads[head].x;
    float value = inside && live ? load<IN_TYPE>(v, b * p.v_batch + head * p.v_head + channel) : 0.0f;
    float *record = records + (i64)unit * RECORD;
    // The first sums and hashes that wait are on their way while tokens are hashed; how many wait is not known yet.
    float own[OWN], own_mass = 0.0f, of_tokens[OF_TOKENS], of_bits[OF_BITS];
    auto fetch = [&](const float *of_unit, int base) {
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            int s = base + strand * OWN + i;
            own[i] = s < BUCKETS && inside ? of_unit[s * COLUMNS + channel] : 0.0f;
        }
        int s = base + threadIdx.x;
        own_mass = threadIdx.x < SLAB && s < BUCKETS ? of_unit[s * COLUMNS + VALUE_DIM] : 0.0f;
    };
    auto fetch_bits = [&](int ensemble) {
#pragma unroll
        for (int i = 0; i < OF_BITS; i++) {
            int at = threadIdx.x + i * BLOCK;
            of_bits[i] = at < PENDING * BITS ? waiting(record, at / BITS)[ensemble * BITS + at % BITS] : 0.0f;
        }
    };
    if (live) {
        fetch(state + (i64)unit * ENSEMBLES * STATE_UNIT, 0);
        fetch_bits(0);
    }
    // Tokens that wait before this one, which takes its place after them.
    int count = live ? (int)bits_of(record[0]) : 0;

    for (int first = 0; first < GROUP; first += HEADS) {
        double result[HEADS] = {};
        barrier();
        for (int i = threadIdx.x; live && i < (HEADS + 1) * HEAD_DIM; i += BLOCK) {
            int h = i / HEAD_DIM, c = i % HEAD_DIM, q_head = first + h - 1 < GROUP ? first + h - 1 : GROUP - 1;
            rows[i] = h == 0 ? load<IN_TYPE>(k, b * p.k_batch + head * p.k_head + c)
                             : load<IN_TYPE>(q, b * p.q_batch + (head * GROUP + q_head) * p.q_head + c);
        }
        for (int ensemble = 0; live && ensemble < ENSEMBLES; ensemble++) {
            const float *of_unit = state + ((i64)unit * ENSEMBLES + ensemble) * STATE_UNIT;
            double sums[HEADS] = {};
#ifdef RATIO
            double found[HEADS] = {};
#endif
            barrier();
            project_rows<HEADS + 1>(hashes, rows, planes + head * p.planes_step + ensemble * BITS * HEAD_DIM);
            if (first + ensemble > 0) fetch_bits(ensemble);
#pragma unroll
            for (int i = 0; i < OF_BITS; i++) {
                if ((int)threadIdx.x + i * BLOCK < count * BITS) late[threadIdx.x + i * BLOCK] = odds_of(of_bits[i]);
            }
            for (int i = threadIdx.x; i < HEADS * PENDING; i += BLOCK) shares[i] = 0.0f;
            barrier();
#pragma unroll
            for (int n = 0; first + ensemble == 0 && n < OF_TOKENS; n++) {
                int i = strand + n * STRANDS;
                of_tokens[n] = i < count && inside ? waiting(record, i)[ENSEMBLES * BITS + channel] : 0.0f;
            }
            for (int i = threadIdx.x; i < (HEADS + 1) * BITS; i += BLOCK) {
                float z = logit_of(hashes[i], beta);
                float2 pair = odds_of(z);
                if (i < BITS) {
                    late[count * BITS + i] = pair;
                    hashes[i] = z;
                } else {
                    odds[i - BITS] = pair;
                }
            }
            for (int base = 0; base < BUCKETS; base += SLAB) {
                int bucket = base + threadIdx.x;
                if (first + ensemble + base > 0) fetch(of_unit, base);
                barrier();
                if ((int)threadIdx.x < SLAB) {
                    double mass = own_mass;
#ifndef RATIO
                    for (int i = 0; bucket < BUCKETS && i <= count; i++) mass += phi_of(late + i * BITS, bucket);
#endif
                    for (int h = 0; h < HEADS; h++) {
                        float phi = bucket < BUCKETS ? phi_of(odds + h * BITS, bucket) : 0.0f;
#ifdef RATIO
                        found[h] += (double)phi * mass;
#else
                        phi = (float)(phi * inverse(mass + 1e-6));
#endif
                        weights[h * SLAB + threadIdx.x] = phi;
                    }
                }
#ifdef RATIO
                // By the threads that have no bucket, if there are such.
                for (int i = BLOCK - 1 - threadIdx.x; base == 0 && i < HEADS * (count + 1); i += BLOCK) {
                    int h = i / (count + 1), token = i % (count + 1);
                    shares[h * PENDING + token] = overlap(odds + h * BITS, late + token * BITS);
                }
#endif
                barrier();
                // Four in floats.
#pragma unroll
                for (int i = 0; i < OWN; i += 4) {
                    for (int h = 0; h < HEADS; h++) {
                        float sum = 0.0f;
                        for (int j = i; j < i + 4 && j < OWN; j++) sum += weights[h * SLAB + strand * OWN + j] * own[j];
                        sums[h] += sum;
                    }
                }
#ifndef RATIO
                for (int i = warp; i < HEADS * (count + 1); i += WARPS) {
                    int h = i / (count + 1), token = i % (count + 1);
                    float sum = 0.0f;
                    for (int s = lane; s < SLAB && base + s < BUCKETS; s += 32) sum += weights[h * SLAB + s] * phi_of(late + token * BITS, base + s);
                    for (int step = 16; step > 0; step >>= 1) sum += from_lane(sum, step);
                    if (lane == 0) shares[h * PENDING + token] += sum;
                }
#endif
            }
#ifdef RATIO
            // Other warps have none.
            for (int h = 0; warp < MASSES && h < HEADS; h++) {
                double mass = found[h];
                for (int step = 16; step > 0; step >>= 1) mass += from_lane(mass, step);
                if (lane == 0) masses[h * MASSES + warp] = mass;
            }
#else
            barrier();
#endif
            // Each strand has some of the tokens that wait.
#pragma unroll
            for (int n = 0; n < OF_TOKENS; n++) {
                int i = strand + n * STRANDS;
                float x = i == count ? value : of_tokens[n];
                for (int h = 0; i <= count && h < HEADS; h++) sums[h] += (double)shares[h * PENDING + i] * x;
            }
            for (int h = 0; h < HEADS; h++) parts[h * BLOCK + threadIdx.x] = sums[h];
            barrier();
            if (threadIdx.x < CHANNELS) {
                for (int h = 0; h < HEADS; h++) {
                    double divisor = 1.0, sum = 0.0;
#ifdef RATIO
                    divisor = 0.0;
                    for (int i = 0; i < MASSES; i++) divisor += masses[h * MASSES + i];
                    for (int i = 0; i <= count; i++) divisor += shares[h * PENDING + i];
#endif
                    for (int i = 0; i < STRANDS; i++) sum += parts[h * BLOCK + i * CHANNELS + threadIdx.x];
                    result[h] += divisor > 0.0 ? sum * inverse(divisor) * p.scale : 0.0;
                }
            }
        }
        if (threadIdx.x < CHANNELS && inside) {
            for (int h = 0; h < HEADS; h++) {
                if (first + h < GROUP) store<OUT_TYPE>(out, ((i64)unit * GROUP + first + h) * VALUE_DIM + channel, (float)(result[h] * (1.0 / ENSEMBLES)));
            }
        }
    }
    if (!live) return;
    bool full = count + 1 == PENDING, last = true;
    if (!full && threadIdx.x < CHANNELS && inside) record[HEADER + count * TOKEN + ENSEMBLES * BITS + channel] = value;
    if (CHANNEL_BLOCKS > 1) {
        // All reads of A and of the count are done when all blocks have been counted.
        barrier();
        if (threadIdx.x == 0) turn = count_up((u32 *)record + 1);
        barrier();
        last = turn == CHANNEL_BLOCKS - 1;
    }
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
            project_rows<1>(hashes, rows, planes + head * p.planes_step + ensemble * BITS * HEAD_DIM);
            for (int i = threadIdx.x; full && i < count * BITS; i += BLOCK) late[i] = odds_of(waiting(record, i / BITS)[ensemble * BITS + i % BITS]);
            barrier();
            for (int i = threadIdx.x; i < BITS; i += BLOCK) {
                hashes[i] = logit_of(hashes[i], beta);
                late[count * BITS + i] = odds_of(hashes[i]);
            }
            barrier();
        }
        float *of_unit = state + ((i64)unit * ENSEMBLES + ensemble) * STATE_UNIT;
        if (full) fold(of_unit, late, phis, values, PENDING, channel, last);
        for (int i = threadIdx.x; !full && i < BITS; i += BLOCK) record[HEADER + count * TOKEN + ensemble * BITS + i] = hashes[i];
    }
    if (last && threadIdx.x == 0) {
        record[1] = float_of(0u);
        record[0] = float_of(full ? 0u : (u32)(count + 1));
    }
}
