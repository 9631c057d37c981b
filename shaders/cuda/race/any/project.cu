// t = tanh(W·x) of queries or keys: a thread per (row, bit).
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_project(const Piece p, const void *x, const float *planes, const u32 *lengths, float *t) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.tokens * p.heads * PER_HEAD * BITS)) return;
    Place r = place_of(p, at / BITS, PER_HEAD);
    float sum = 0.0f;
    if (r.token < (int)lengths[r.b]) {
        const float *w = planes + (p.head + r.head) * p.planes_step + at % BITS * HEAD_DIM;
        i64 from = x_at(p, r, PER_HEAD);
        for (int c = 0; c < HEAD_DIM; c++) sum += w[c] * load<IN_TYPE>(x, from + c);
    }
    t[at] = tanhf(sum);
}
