// What the queries of a chunk give to the gradient of the sums that they read: a thread per element of a matrix.
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_query_sums(const Piece p, const void *grad_o, const float *psi, const float *masses, const float *statistics,
                                          const u32 *lengths, float *matrices) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.heads * p.chunks * MATRIX)) return;
    int column = at % COLUMNS, bucket = at / COLUMNS % (BUCKETS + 1);
    i64 matrix = at / MATRIX;
    Place r = {(int)(matrix / p.chunks / p.heads), (int)(matrix % p.chunks) * CHUNK, (int)(matrix / p.chunks % p.heads), 0};
    int end = (int)lengths[r.b] < r.token + CHUNK ? (int)lengths[r.b] : r.token + CHUNK;
    float sum = 0.0f;
    for (; r.token < end; r.token++) {
        for (r.in_group = 0; r.in_group < GROUP; r.in_group++) {
            i64 row = key_row(p, r, r.token) * GROUP + r.in_group;
            if (column == VALUE_DIM) {
                sum += masses[row * (BUCKETS + 1) + bucket];
            } else {
                float weight = bucket < BUCKETS ? psi[row * BUCKETS + bucket] : statistics[row * STATISTICS + 1];
                sum += weight * load<GRAD_TYPE>(grad_o, x_at(p, r, GROUP) + column);
            }
        }
    }
    matrices[((i64)(r.b * p.heads + r.head) * p.slots + matrix % p.chunks) * MATRIX + bucket * COLUMNS + column] = sum;
}
