// From sums of chunks to those before (REVERSED: after) each, in their place, from those before each group: a thread per
// element of a group.
#include "groups.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_group_prefix(const Groups p, const float *before, float *matrices) {
    i64 at;
    if (!element_of(at, (i64)p.units * p.groups * MATRIX)) return;
    int count;
    float *to = matrices + first_of(p, at, count), sums[GROUP_CHUNKS];
#pragma unroll
    for (int i = 0; i < GROUP_CHUNKS; i++) sums[i] = i < count ? to[(i64)i * MATRIX] : 0.0f;
    double value = before[at];
#pragma unroll
    for (int step = 0; step < GROUP_CHUNKS; step++) {
#ifdef REVERSED
        int i = GROUP_CHUNKS - 1 - step;
#else
        int i = step;
#endif
        if (i < count) to[(i64)i * MATRIX] = (float)value;
        value += sums[i];
    }
}
