// Sums over pieces of a head in doubles, as race_truth.rs makes them, one piece a block; follows counter.cuh.
// Defined from outside: HEAD, PLANES and TABLES. A thread for each channel, at least as many as there are buckets.

#define BITS (PLANES * TABLES)
#define BUCKETS (TABLES << PLANES)
#define TILE 16
#define LANES (CHANNELS / TILE)

struct Part {
    u32 base;
    float scale;
};

struct Tensors {
    Part q, k, v, grad_o;
    u32 period;
    u32 reserved;
    double beta;
};

struct Tile {
    double x[TILE][CHANNELS + 1];
    double high[TILE][BITS];
};

// As the tensor holds it.
__device__ double value(u32 key, u32 channel, float scale) {
    float x = element(key, channel, scale);
#if BF16
    x = __uint_as_float(two_bf16(x, 0.0f) << 16);
#endif
    return x;
}

// Weights of `count` tokens from `first` on, one row each.
__device__ void hash(
    const Tensors& tensors, Part part, u64 first, u32 count, const double* planes, Tile& tile, double (*phi)[BUCKETS]
) {
    for (u32 t = 0; t < count; ++t) {
        u32 key = row_key(part.base, (first + t) % tensors.period, tensors.period, HEAD);
        tile.x[t][threadIdx.x] = value(key, threadIdx.x, part.scale);
    }
    __syncthreads();
    for (u32 task = threadIdx.x; task < TILE * BITS; task += CHANNELS) {
        u32 t = task % TILE, bit = task / TILE;
        if (t >= count) continue;
        double sums[4] = {};
        for (u32 c = 0; c < CHANNELS; c += 4) {
#pragma unroll
            for (u32 i = 0; i < 4; ++i) sums[i] += planes[bit * CHANNELS + c + i] * tile.x[t][c + i];
        }
        double u = (sums[0] + sums[1]) + (sums[2] + sums[3]);
        tile.high[t][bit] = 1.0 / (1.0 + exp(-2.0 * tensors.beta * tanh(u)));
    }
    __syncthreads();
    for (u32 task = threadIdx.x; task < TILE * BUCKETS; task += CHANNELS) {
        u32 t = task / BUCKETS, table = task % BUCKETS >> PLANES, code = task % BUCKETS & ((1u << PLANES) - 1u);
        if (t >= count) continue;
        double weight = 1.0;
        for (u32 p = 0; p < PLANES; ++p) {
            double high = tile.high[t][table * PLANES + p];
            // Plane 0 is the most significant bit.
            weight *= code >> (PLANES - 1 - p) & 1u ? high : 1.0 - high;
        }
        phi[t][task % BUCKETS] = weight;
    }
    __syncthreads();
}

// What the keys of each piece bring: A, then B, `[bucket, channel]`. Piece i ends where piece i + 1 begins.
extern "C" __global__ void __launch_bounds__(CHANNELS)
absorbed(Tensors tensors, const double* planes, const u64* cuts, double* out) {
    __shared__ Tile tile;
    __shared__ double phi[TILE][BUCKETS];
    const u32 c = threadIdx.x;
    double b[BUCKETS] = {}, a = 0.0;
    for (u64 first = cuts[blockIdx.x], end = cuts[blockIdx.x + 1]; first < end; first += TILE) {
        u32 count = end - first < TILE ? u32(end - first) : TILE;
        hash(tensors, tensors.k, first, count, planes, tile, phi);
        for (u32 t = 0; t < count; ++t) {
            u32 key = row_key(tensors.v.base, (first + t) % tensors.period, tensors.period, HEAD);
            double v = value(key, c, tensors.v.scale);
#pragma unroll
            for (u32 r = 0; r < BUCKETS; ++r) b[r] += phi[t][r] * v;
            if (c < BUCKETS) a += phi[t][c];
        }
        __syncthreads();
    }
    out += u64(blockIdx.x) * BUCKETS * (CHANNELS + 1);
    if (c < BUCKETS) out[c] = a;
    for (u32 r = 0; r < BUCKETS; ++r) out[BUCKETS + r * CHANNELS + c] = b[r];
}

// What the queries of each piece send to the sums that they read, given those before it, in the same layout.
extern "C" __global__ void __launch_bounds__(CHANNELS)
sent(Tensors tensors, const double* planes, const u64* cuts, const double* before, double* out) {
    __shared__ Tile tile;
    __shared__ double phi_k[TILE][BUCKETS], phi_q[TILE][BUCKETS], mass[TILE][BUCKETS], total[TILE], d_mass[TILE];
    const u32 c = threadIdx.x;
    before += u64(blockIdx.x) * BUCKETS * (CHANNELS + 1);
    double b[BUCKETS], a = c < BUCKETS ? before[c] : 0.0, sent_b[BUCKETS] = {}, sent_a = 0.0;
#pragma unroll
    for (u32 r = 0; r < BUCKETS; ++r) b[r] = before[BUCKETS + r * CHANNELS + c];
    for (u64 first = cuts[blockIdx.x], end = cuts[blockIdx.x + 1]; first < end; first += TILE) {
        u32 count = end - first < TILE ? u32(end - first) : TILE;
        hash(tensors, tensors.k, first, count, planes, tile, phi_k);
        hash(tensors, tensors.q, first, count, planes, tile, phi_q);
        if (c < BUCKETS) {
            for (u32 t = 0; t < count; ++t) mass[t][c] = a += phi_k[t][c];
        }
        __syncthreads();
        if (c < count) {
            double sum = 0.0;
            for (u32 r = 0; r < BUCKETS; ++r) sum += phi_q[c][r] * mass[c][r];
            total[c] = sum;
        }
        __syncthreads();
        for (u32 t = 0; t < count; ++t) {
            u64 token = (first + t) % tensors.period;
            double v = value(row_key(tensors.v.base, token, tensors.period, HEAD), c, tensors.v.scale);
            double g = value(row_key(tensors.grad_o.base, token, tensors.period, HEAD), c, tensors.grad_o.scale);
            g /= total[t];
            double read = 0.0;
#pragma unroll
            for (u32 r = 0; r < BUCKETS; ++r) {
                b[r] += phi_k[t][r] * v;
                read += phi_q[t][r] * b[r];
                sent_b[r] += phi_q[t][r] * g;
            }
            tile.x[t][c] = g * read;
        }
        __syncthreads();
        // As many threads for each token as there are.
        u32 t = c / LANES, lane = c % LANES;
        double sum = 0.0;
        if (t < count) {
            for (u32 i = lane; i < CHANNELS; i += LANES) sum += tile.x[t][i];
        }
        for (u32 step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
        if (t < count && lane == 0) d_mass[t] = -sum / total[t];
        __syncthreads();
        if (c < BUCKETS) {
            for (u32 t = 0; t < count; ++t) sent_a += phi_q[t][c] * d_mass[t];
        }
        __syncthreads();
    }
    out += u64(blockIdx.x) * BUCKETS * (CHANNELS + 1);
    if (c < BUCKETS) out[c] = sent_a;
    for (u32 r = 0; r < BUCKETS; ++r) out[BUCKETS + r * CHANNELS + c] = sent_b[r];
}
