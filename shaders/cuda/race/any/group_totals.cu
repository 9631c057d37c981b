// Sums of the chunks of each group: a thread per element of a group.
#include "groups.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_group_totals(const Groups p, const float *sums, float *totals) {
    i64 at;
    if (!element_of(at, (i64)p.units * p.groups * MATRIX)) return;
    int count;
    const float *from = sums + first_of(p, at, count);
    double total = 0.0;
#pragma unroll
    for (int i = 0; i < GROUP_CHUNKS; i++) total += i < count ? from[(i64)i * MATRIX] : 0.0f;
    totals[at] = (float)total;
}
