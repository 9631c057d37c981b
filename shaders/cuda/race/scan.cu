// Sums over spans. The state, `[sequence, kv head, S, Dv + 1]` in doubles, holds B and in the last column A, or the
// gradient of them. One block per (unit, eight columns), 64 rows at a time.
//
// | | state s → matrix row s | last row | back |
// |---|---|---|---|
// | forward | R·x_s − c·m | m = Σ x / L | (c·m + M_s) / R |
// | reverse | x_s / R − c·m / S | m = Σ x / R | R·M_s + (M_S − c·Σ M) / L |
#define SCAN_THREADS 512
#define SCAN_COLUMNS 8
struct Scan {
    // Sums of each span; `before` becomes what precedes (reverse: follows) it. They may be the same.
    const float *sums;
    float *before;
    const float2 *heads;
    double *state;
    // Spans; matrices of `sums` that add up in each; whether the state moves on.
    u32 spans, group, kv_heads, keep;
};

__device__ __forceinline__ double column_sum(double *parts, double x) {
    barrier();
    parts[threadIdx.x] = x;
    barrier();
    for (int step = SCAN_THREADS / 2; step >= SCAN_COLUMNS; step >>= 1) {
        if (threadIdx.x < step) parts[threadIdx.x] += parts[threadIdx.x + step];
        barrier();
    }
    return parts[threadIdx.x % SCAN_COLUMNS];
}

template <bool REVERSE> __device__ __forceinline__ void scan(const Scan &p) {
    __shared__ double parts[SCAN_THREADS];
    __shared__ double lasts[SCAN_COLUMNS];
    constexpr int blocks = (COLUMNS + SCAN_COLUMNS - 1) / SCAN_COLUMNS;
    constexpr int step = SCAN_THREADS / SCAN_COLUMNS;
    constexpr double radix = RADIX;
    int unit = blockIdx.x / blocks, column = blockIdx.x % blocks * SCAN_COLUMNS + threadIdx.x % SCAN_COLUMNS;
    int first_row = threadIdx.x / SCAN_COLUMNS;
    double centre = p.heads[unit % p.kv_heads].y;
    bool inside = column < COLUMNS;
    double *state = p.state + (i64)unit * BUCKETS * COLUMNS + column;
    const float *sums = p.sums + (i64)unit * p.group * p.spans * MATRIX + column;
    float *before = p.before + (i64)unit * p.spans * MATRIX + column;
    double total = 0.0;
    for (int s = first_row; inside && s < BUCKETS; s += step) total += state[s * COLUMNS];
    total = column_sum(parts, total);
    double last = REVERSE ? total * centre / radix : total / TABLES;
    double last_after = last;
    if (!REVERSE) {
        double added = 0.0;
        for (int i = first_row; inside && i < (int)p.spans; i += step) added += sums[(i64)i * MATRIX + BUCKETS * COLUMNS];
        last_after = last + column_sum(parts, added);
    }
    double of_buckets = 0.0;
    for (int s = first_row; inside && s <= BUCKETS; s += step) {
        double value = s == BUCKETS ? last : REVERSE ? state[s * COLUMNS] / radix - last / BUCKETS : state[s * COLUMNS] * radix - centre * last;
        for (int base = 0; base < (int)p.spans; base += 8) {
            float x[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                int at = base + i < (int)p.spans ? base + i : (int)p.spans - 1;
                at = REVERSE ? p.spans - 1 - at : at;
                x[i] = 0.0f;
                for (int g = 0; g < (int)p.group; g++) x[i] += sums[((i64)g * p.spans + at) * MATRIX + s * COLUMNS];
            }
#pragma unroll
            for (int i = 0; i < 8; i++) {
                if (base + i < (int)p.spans) {
                    int at = REVERSE ? p.spans - 1 - base - i : base + i;
                    before[(i64)at * MATRIX + s * COLUMNS] = (float)value;
                    value += x[i];
                }
            }
        }
        if (REVERSE && s == BUCKETS) lasts[threadIdx.x % SCAN_COLUMNS] = value;
        if (s < BUCKETS && !p.keep) {
            of_buckets += value;
            state[s * COLUMNS] = REVERSE ? value * radix : (centre * last_after + value) / radix;
        }
    }
    if (REVERSE && !p.keep) {
        of_buckets = column_sum(parts, of_buckets);
        double rest = (lasts[threadIdx.x % SCAN_COLUMNS] - centre * of_buckets) / TABLES;
        for (int s = first_row; inside && s < BUCKETS; s += step) state[s * COLUMNS] += rest;
    }
}

extern "C" __global__ void __launch_bounds__(SCAN_THREADS) race_scan(const Scan p) { scan<false>(p); }
extern "C" __global__ void __launch_bounds__(SCAN_THREADS) race_scan_back(const Scan p) { scan<true>(p); }

// Adds shares of the gradients of hyperplanes and β, `[sequence and span, head, bits, head_dim + 1]`, to sums in doubles
// `[set, bits, head_dim + 1]`: one block per 32 elements of a set, eight threads each.
struct Shares {
    const float *shares;
    double *totals;
    // Blocks of a head, heads of the shares, of a set.
    u32 parts, heads, heads_of_set, elements;
};

extern "C" __global__ void __launch_bounds__(256) race_add_parameters(const Shares p) {
    __shared__ double parts[256];
    u32 blocks = (p.elements + 31) / 32;
    u32 set = blockIdx.x / blocks, element = blockIdx.x % blocks * 32 + threadIdx.x % 32;
    double sum = 0.0;
    if (element < p.elements) {
        for (u32 i = threadIdx.x / 32; i < p.parts * p.heads_of_set; i += 8) {
            u32 part = i / p.heads_of_set, head = set * p.heads_of_set + i % p.heads_of_set;
            sum += p.shares[((i64)part * p.heads + head) * p.elements + element];
        }
    }
    parts[threadIdx.x] = sum;
    barrier();
    if (threadIdx.x < 32 && element < p.elements) {
        for (int i = 1; i < 8; i++) sum += parts[threadIdx.x + 32 * i];
        p.totals[(i64)set * p.elements + element] += sum;
    }
}
