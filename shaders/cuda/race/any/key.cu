// w = dα·R·φ of each key and bucket, from the gradient of the sums after its chunk and, but for ABSORB, the chunk's own
// later queries: a thread each.
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_key(const Piece p, const void *v, const float *alpha, const float *gains, const float *psi, const float *masses,
                                   const float *matrices, const float2 *heads, const u32 *lengths, float *w) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.tokens * p.heads * BUCKETS)) return;
    i64 row = at / BUCKETS;
    int s = at % BUCKETS;
    Place r = place_of(p, row, 1);
    float sum = 0.0f;
    if (r.token < (int)lengths[r.b]) {
        const float *of_bucket = matrices + matrix_at(p, r) + s * COLUMNS;
        i64 x = x_at(p, r, 1);
        sum = of_bucket[VALUE_DIM];
        for (int c = 0; c < VALUE_DIM; c++) sum += load<IN_TYPE>(v, x + c) * of_bucket[c];
#ifndef ABSORB
        int end = r.token / CHUNK * CHUNK + CHUNK;
        end = end < (int)lengths[r.b] ? end : (int)lengths[r.b];
        for (int i = r.token; i < end; i++) {
            for (int g = 0; g < GROUP; g++) {
                i64 query = key_row(p, r, i) * GROUP + g;
                sum += gains[query * CHUNK + r.token % CHUNK] * psi[query * BUCKETS + s] + masses[query * (BUCKETS + 1) + s];
            }
        }
#endif
        sum *= alpha[at] + heads[p.head + r.head].y;
    }
    w[at] = sum;
}
