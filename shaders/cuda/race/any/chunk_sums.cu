// [α, 1]ᵀ[v, 1] of the keys of each chunk: a thread per element of a matrix.
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_chunk_sums(const Piece p, const void *v, const float *alpha, const u32 *lengths, float *matrices) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.heads * p.chunks * MATRIX)) return;
    int column = at % COLUMNS, bucket = at / COLUMNS % (BUCKETS + 1);
    i64 matrix = at / MATRIX;
    Place r = {(int)(matrix / p.chunks / p.heads), (int)(matrix % p.chunks) * CHUNK, (int)(matrix / p.chunks % p.heads), 0};
    int end = (int)lengths[r.b] < r.token + CHUNK ? (int)lengths[r.b] : r.token + CHUNK;
    float sum = 0.0f;
    for (; r.token < end; r.token++) {
        float weight = bucket < BUCKETS ? alpha[key_row(p, r, r.token) * BUCKETS + bucket] : 1.0f;
        sum += column < VALUE_DIM ? weight * load<IN_TYPE>(v, x_at(p, r, 1) + column) : weight;
    }
    matrices[((i64)(r.b * p.heads + r.head) * p.slots + matrix % p.chunks) * MATRIX + bucket * COLUMNS + column] = sum;
}
