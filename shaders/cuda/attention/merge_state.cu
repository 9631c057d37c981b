// Merges two attention results over disjoint key sets: one thread per element of o, rows of p.width channels.
#include "common/numbers.cuh"

struct Params {
    u64 elements;
    u32 width;
    u32 reserved;
};

extern "C" __global__ void merge_state(const __grid_constant__ Params p, const void* __restrict__ o1,
                                       const float* __restrict__ lse1, const void* __restrict__ o2,
                                       const float* __restrict__ lse2, void* __restrict__ o,
                                       float* __restrict__ lse) {
    const u64 at = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (at >= p.elements) {
        return;
    }
    const u64 row = at / p.width;
    const float none = __uint_as_float(0xff800000u);
    const float a = lse1[row];
    const float b = lse2[row];
    const float top = fmaxf(a, b);
    // An empty set's o may hold anything; it has no weight, and NaN must not come of it.
    const float weight1 = a == none ? 0.0f : expf(a - top);
    const float weight2 = b == none ? 0.0f : expf(b - top);
    const float sum = weight1 + weight2;
    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
    store<O1>(o, at, (weight1 * load<O1>(o1, at) + weight2 * load<O2>(o2, at)) * scale);
    if (at == row * p.width) {
        lse[row] = sum == 0.0f ? none : top + logf(sum);
    }
}
