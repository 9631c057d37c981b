// G·M + Σ (G·v)·α of each query and bucket, the row of sums included as the last: a thread each.
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_values(const Piece p, const void *grad_o, const float *gains, const float *keys, const float *matrices, const u32 *lengths,
                                      float *values) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.tokens * p.heads * GROUP * (BUCKETS + 1))) return;
    i64 row = at / (BUCKETS + 1);
    int s = at % (BUCKETS + 1);
    Place r = place_of(p, row, GROUP);
    float sum = 0.0f;
    if (r.token < (int)lengths[r.b]) {
        const float *of_bucket = matrices + matrix_at(p, r) + s * COLUMNS;
        i64 g = x_at(p, r, GROUP);
        for (int c = 0; c < VALUE_DIM; c++) sum += load<GRAD_TYPE>(grad_o, g + c) * of_bucket[c];
#ifndef READ
        for (int i = 0; i <= r.token % CHUNK; i++) {
            float weight = s < BUCKETS ? keys[key_row(p, r, r.token / CHUNK * CHUNK + i) * BUCKETS + s] : 1.0f;
            sum += gains[row * CHUNK + i] * weight;
        }
#endif
        sum *= p.scale;
    }
    values[at] = sum;
}
