// Gradients of hyperplanes and β from their sums in doubles, `[set, ensemble, bits, head_dim + 1]`: a thread per element
// of the hyperplanes, `[plane set, ensemble, bits, head_dim]`, then one per value of β.
#include "any.cuh"

struct Finish {
    u32 sets, plane_sets, betas, reserved;
};

extern "C" __global__ void __launch_bounds__(BLOCK) any_finish_parameters(const Finish p, const double *totals, float *planes, float *betas) {
    constexpr int all = ENSEMBLES * BITS;
    i64 at, of_planes = (i64)p.plane_sets * all * HEAD_DIM;
    if (!element_of(at, of_planes + p.betas)) return;
    if (at < of_planes) {
        u32 first = p.plane_sets > 1 ? at / (all * HEAD_DIM) : 0, last = p.plane_sets > 1 ? first + 1 : p.sets;
        double sum = 0.0;
        for (u32 i = first; i < last; i++) sum += totals[((i64)i * all + at / HEAD_DIM % all) * (HEAD_DIM + 1) + at % HEAD_DIM];
        planes[at] = (float)sum;
        return;
    }
    u32 first = p.betas > 1 ? at - of_planes : 0, last = p.betas > 1 ? first + 1 : p.sets;
    double sum = 0.0;
    for (i64 i = (i64)first * all; i < (i64)last * all; i++) sum += totals[i * (HEAD_DIM + 1) + HEAD_DIM];
    betas[at - of_planes] = (float)sum;
}
