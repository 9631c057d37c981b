// Sums over spans. The state (see state.cuh), `[sequence, kv head, S, Dv + 1]`, holds B and in the last column A, or the
// gradient of them. One block per (unit, eight columns), 64 rows at a time.
//
// | | state s → matrix row s | last row | back |
// |---|---|---|---|
// | forward | R·x_s − c·m | m = Σ x / L | (c·m + M_s) / R |
// | reverse | x_s / R − c·m / S | m = Σ x / R | R·M_s + (M_S − c·Σ M) / L |
#include "state.cuh"

#define SCAN_THREADS 512
#define SCAN_COLUMNS 8
struct Scan {
    // Sums of the state from a sequence's, a head's to the next's.
    i64 state_batch, state_head;
    // Spans, and room for them; matrices of `sums` that add up in each; heads of a sequence; whether the state stays.
    u32 spans, slots, group, heads_of_sequence, keep;
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

// `all_before` becomes what precedes each span (reverse: follows it), of `all_sums`. They may be the same.
template <bool REVERSE>
__device__ __forceinline__ void scan(const Scan &p, const float *all_sums, float *all_before, const float2 *heads, float *all_states) {
    __shared__ double parts[SCAN_THREADS];
    __shared__ double lasts[SCAN_COLUMNS];
    constexpr int blocks = (COLUMNS + SCAN_COLUMNS - 1) / SCAN_COLUMNS;
    constexpr int step = SCAN_THREADS / SCAN_COLUMNS;
    constexpr double radix = RADIX;
    int unit = blockIdx.x / blocks, column = blockIdx.x % blocks * SCAN_COLUMNS + threadIdx.x % SCAN_COLUMNS;
    int first_row = threadIdx.x / SCAN_COLUMNS;
    double centre = heads[unit % p.heads_of_sequence].y;
    bool inside = column < COLUMNS;
    float *state = all_states + 2 * (unit / p.heads_of_sequence * p.state_batch + unit % p.heads_of_sequence * p.state_head) + column;
    const float *sums = all_sums + (i64)unit * p.group * p.slots * MATRIX + column;
    float *before = all_before + (i64)unit * p.slots * MATRIX + column;
    double total = 0.0;
    for (int s = first_row; inside && s < BUCKETS; s += step) total += sum_at(state, s * COLUMNS);
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
        double value = s == BUCKETS ? last : REVERSE ? sum_at(state, s * COLUMNS) / radix - last / BUCKETS : sum_at(state, s * COLUMNS) * radix - centre * last;
        for (int base = 0; base < (int)p.spans; base += 16) {
            float x[16];
#pragma unroll
            for (int i = 0; i < 16; i++) {
                int at = base + i < (int)p.spans ? base + i : (int)p.spans - 1;
                at = REVERSE ? p.spans - 1 - at : at;
                x[i] = 0.0f;
                for (int g = 0; g < (int)p.group; g++) x[i] += sums[((i64)g * p.slots + at) * MATRIX + s * COLUMNS];
            }
#pragma unroll
            for (int i = 0; i < 16; i++) {
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
            set_sum(state, s * COLUMNS, REVERSE ? value * radix : (centre * last_after + value) / radix);
        }
    }
    if (REVERSE && !p.keep) {
        of_buckets = column_sum(parts, of_buckets);
        double rest = (lasts[threadIdx.x % SCAN_COLUMNS] - centre * of_buckets) / TABLES;
        for (int s = first_row; inside && s < BUCKETS; s += step) set_sum(state, s * COLUMNS, sum_at(state, s * COLUMNS) + rest);
    }
}

#ifdef REVERSED
#define SCAN_NAME race_scan_back
#define SCAN_REVERSED true
#else
#define SCAN_NAME race_scan
#define SCAN_REVERSED false
#endif
extern "C" __global__ void __launch_bounds__(SCAN_THREADS) SCAN_NAME(const Scan p, const float *all_sums, float *all_before, const float2 *heads, float *all_states) {
    scan<SCAN_REVERSED>(p, all_sums, all_before, heads, all_states);
}
