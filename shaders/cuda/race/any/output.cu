// Outputs: a thread per (query, channel). Where c = 1 values are taken from their mean, which all weights bring back.
// FLAG 1 adds to `sums` of earlier ensembles, FLAG 2 writes the result.
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_output(const Piece p, const void *v, const float *psi, const float *products, const float *statistics, const float *matrices,
                                      const float2 *heads, const u32 *lengths, float *sums, void *out) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.tokens * p.heads * GROUP * VALUE_DIM)) return;
    i64 row = at / VALUE_DIM;
    int c = at % VALUE_DIM;
    Place r = place_of(p, row, GROUP);
    float o = 0.0f;
    if (r.token < (int)lengths[r.b]) {
        const float *matrix = matrices + matrix_at(p, r), *of_row = statistics + row * STATISTICS;
        float centre = heads[p.head + r.head].y, seen = matrix[BUCKETS * COLUMNS + VALUE_DIM], mean = 0.0f;
        if (seen > 0.0f) mean = centre * matrix[BUCKETS * COLUMNS + c] / seen;
#ifndef READ
        Place key = r;
        key.in_group = 0;
        key.token = r.token / CHUNK * CHUNK;
        if (!(seen > 0.0f)) mean = centre * load<IN_TYPE>(v, x_at(p, key, 1) + c);
#endif
        float sum = of_row[1] * (matrix[BUCKETS * COLUMNS + c] - seen * mean) - of_row[3] * mean;
        for (int s = 0; s < BUCKETS; s++) sum += psi[row * BUCKETS + s] * matrix[s * COLUMNS + c];
#ifndef READ
        for (int i = 0; key.token <= r.token; key.token++, i++) sum += products[row * CHUNK + i] * (load<IN_TYPE>(v, x_at(p, key, 1) + c) - mean);
#endif
        o = sum * of_row[0] + of_row[2] * mean;
    }
#if ENSEMBLES > 1
    if (p.flags & 1) o += sums[at];
    sums[at] = o;
    o /= ENSEMBLES;
    if (!(p.flags & 2)) return;
#endif
    store<OUT_TYPE>(out, out_at(p, r, GROUP, VALUE_DIM) + c, o);
}
