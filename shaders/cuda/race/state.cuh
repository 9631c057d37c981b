// The sums of a state: of each (sequence, kv head, ensemble) S rows of Dv channels of B and one of A, each a pair of
// floats whose sum it is. All high parts stand before all low ones: what only reads, and answers in floats, takes the high
// ones alone, which are half of the bytes.
#pragma once
#include "machine.cuh"

#define STATE_PLANE (BUCKETS * COLUMNS)
// Floats of one.
#define STATE_UNIT (2 * STATE_PLANE)

__device__ __forceinline__ double sum_at(const float *of_unit, int at) { return (double)of_unit[at] + (double)of_unit[STATE_PLANE + at]; }

// Adds to a pair what is a float, to about 2^-48 of the sum.
__device__ __forceinline__ void add_to_pair(float &high, float &low, float x) {
    float sum = high + x, of_x = sum - high;
    low += (high - (sum - of_x)) + (x - of_x);
    high = sum + low;
    low -= high - sum;
}

__device__ __forceinline__ void set_sum(float *of_unit, int at, double sum) {
    float high = (float)sum;
    of_unit[at] = high;
    of_unit[STATE_PLANE + at] = (float)(sum - (double)high);
}
