// Shares of dW = Σ du·xᵀ and, in the last column, of β's gradient, `[share, head of the piece, bits, head_dim + 1]`: a
// block per (share, head, tile of bits and channels). A share is `share` tokens of a sequence.
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_hash_parameters(const Piece p, const void *x, const float2 *du, const u32 *lengths, float *shares) {
    constexpr int M = tile_of(BITS, MOST_ROWS), N = wide_tile(HEAD_DIM), ROW_TILES = tiles_of(BITS, MOST_ROWS), TILES = ROW_TILES * tiles_of(HEAD_DIM, MOST_COLUMNS);
    __shared__ float room[OfBuckets<M, N>::ROOM];
    u32 part = blockIdx.x % TILES, share = blockIdx.x / TILES / p.heads, of_sequence = (p.tokens + p.share - 1) / p.share;
    int bit = part % ROW_TILES * M, channel = part / ROW_TILES * N;
    Place r = {(int)(share / of_sequence), (int)(share % of_sequence * p.share), (int)(blockIdx.x / TILES % p.heads), 0};
    int steps = (int)lengths[r.b] - r.token;
    steps = steps < 0 ? 0 : steps < (int)p.share ? steps : (int)p.share;
    const float2 *of_rows = du + key_row(p, r, r.token) * PER_HEAD * BITS + bit;
    u32 step = p.heads * PER_HEAD * BITS;
    OfBuckets<M, N> sums;
    for (r.in_group = 0; r.in_group < PER_HEAD; r.in_group++) {
        i64 from = x_at(p, r, PER_HEAD) + channel;
        sums.template add<false, false, true>(
            room, steps, [&](int b, int i) { return bit + b < BITS ? of_rows[i * step + r.in_group * BITS + b].x : 0.0f; },
            [&](int c, int i) { return channel + c < HEAD_DIM ? load_raw<IN_TYPE>(x, from + i * p.x_token + c) : 0.0f; }, AsItIs(), Finite());
    }
    float *to = shares + ((i64)(blockIdx.x / TILES) * BITS + bit) * (HEAD_DIM + 1);
    sums.each([&](int b, int c, float sum) {
        if (bit + b < BITS && channel + c < HEAD_DIM) to[b * (HEAD_DIM + 1) + channel + c] = sum;
    });
    if (channel > 0) return;
    sum_rows<M>(
        room, steps * PER_HEAD, [&](int b, int i) { return bit + b < BITS ? of_rows[i / PER_HEAD * step + i % PER_HEAD * BITS + b].y : 0.0f; },
        [&](int b, float sum) {
            if (bit + b < BITS) to[b * (HEAD_DIM + 1) + HEAD_DIM] = sum;
        });
}
