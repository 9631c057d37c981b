// dq or dk = Wᵀ·du: a thread per (row, channel). FLAG 1 adds to what earlier ensembles gave.
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_hash_inputs(const Piece p, const float2 *du, const float *planes, float *dx) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.tokens * p.heads * PER_HEAD * HEAD_DIM)) return;
    i64 row = at / HEAD_DIM;
    int c = at % HEAD_DIM;
    Place r = place_of(p, row, PER_HEAD);
    const float *w = planes + (p.head + r.head) * p.planes_step + c;
    float sum = 0.0f;
    for (int bit = 0; bit < BITS; bit++) sum += du[row * BITS + bit].x * w[bit * HEAD_DIM];
    i64 to = out_at(p, r, PER_HEAD, HEAD_DIM) + c;
    dx[to] = p.flags & 1 ? dx[to] + sum : sum;
}
