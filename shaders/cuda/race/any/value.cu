// dv: a thread per (key, channel). FLAG 1 adds to what earlier ensembles gave.
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_value(const Piece p, const void *grad_o, const float *alpha, const float *products, const float *matrices,
                                     const u32 *lengths, float *dv) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.tokens * p.heads * VALUE_DIM)) return;
    i64 row = at / VALUE_DIM;
    int c = at % VALUE_DIM;
    Place r = place_of(p, row, 1);
    float sum = 0.0f;
    if (r.token < (int)lengths[r.b]) {
        const float *matrix = matrices + matrix_at(p, r) + c;
        sum = matrix[BUCKETS * COLUMNS];
        for (int s = 0; s < BUCKETS; s++) sum += alpha[row * BUCKETS + s] * matrix[s * COLUMNS];
#ifndef ABSORB
        int end = r.token / CHUNK * CHUNK + CHUNK;
        end = end < (int)lengths[r.b] ? end : (int)lengths[r.b];
        Place query = r;
        for (query.token = r.token; query.token < end; query.token++) {
            for (query.in_group = 0; query.in_group < GROUP; query.in_group++) {
                i64 of_query = key_row(p, r, query.token) * GROUP + query.in_group;
                sum += products[of_query * CHUNK + r.token % CHUNK] * load<GRAD_TYPE>(grad_o, x_at(p, query, GROUP) + c);
            }
        }
#endif
    }
    i64 to = out_at(p, r, 1, VALUE_DIM) + c;
    dv[to] = p.flags & 1 ? dv[to] + sum : sum;
}
