// Shares of dW = Σ du·xᵀ and, in the last column, of β's gradient, `[share, head of the piece, bits, head_dim + 1]`: a
// thread per element. A share is `share` rows of a head.
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_hash_parameters(const Piece p, const void *x, const float2 *du, const u32 *lengths, float *shares) {
    i64 rows = (i64)p.batch * p.tokens * PER_HEAD, at;
    if (!element_of(at, (rows + p.share - 1) / p.share * p.heads * BITS * (HEAD_DIM + 1))) return;
    int c = at % (HEAD_DIM + 1), bit = at / (HEAD_DIM + 1) % BITS;
    int head = at / ((HEAD_DIM + 1) * BITS) % p.heads;
    i64 first = at / ((HEAD_DIM + 1) * BITS) / p.heads * p.share;
    float sum = 0.0f;
    for (i64 i = first; i < first + p.share && i < rows; i++) {
        Place r = {(int)(i / PER_HEAD / p.tokens), (int)(i / PER_HEAD % p.tokens), head, (int)(i % PER_HEAD)};
        if (r.token >= (int)lengths[r.b]) continue;
        float2 pair = du[(key_row(p, r, r.token) * PER_HEAD + r.in_group) * BITS + bit];
        sum += c < HEAD_DIM ? pair.x * load<IN_TYPE>(x, x_at(p, r, PER_HEAD) + c) : pair.y;
    }
    shares[at] = sum;
}
