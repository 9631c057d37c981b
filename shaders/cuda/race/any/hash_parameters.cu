// Shares of dW = Σ du·xᵀ and, in the last column, of β's gradient, `[share, head of the piece, bits, head_dim + 1]`: a
// block per (share, head, tile of bits and channels). A share is `share` rows of a head.
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_hash_parameters(const Piece p, const void *x, const float2 *du, const u32 *lengths, float *shares) {
    constexpr int M = tile_of(BITS, MOST_ROWS), N = wide_tile(HEAD_DIM), ROW_TILES = tiles_of(BITS, MOST_ROWS), TILES = ROW_TILES * tiles_of(HEAD_DIM, MOST_COLUMNS);
    __shared__ float room[OfBuckets<M, N>::ROOM];
    int part = blockIdx.x % TILES, head = blockIdx.x / TILES % p.heads;
    int bit = part % ROW_TILES * M, channel = part / ROW_TILES * N;
    u32 rows = p.batch * p.tokens * PER_HEAD, first = blockIdx.x / TILES / p.heads * p.share;
    int steps = rows - first < p.share ? rows - first : p.share;
    auto place = [&](int step) {
        u32 i = first + step;
        Place r = {(int)(i / PER_HEAD / p.tokens), (int)(i / PER_HEAD % p.tokens), head, (int)(i % PER_HEAD)};
        return r;
    };
    // Of padding it is zero.
    auto of_row = [&](int b, int step) {
        Place r = place(step);
        return du[(key_row(p, r, r.token) * PER_HEAD + r.in_group) * BITS + bit + b];
    };
    OfBuckets<M, N> sums;
    sums.template add<false, false>(
        room, steps, [&](int b, int step) { return bit + b < BITS ? of_row(b, step).x : 0.0f; },
        [&](int c, int step) {
            Place r = place(step);
            return channel + c < HEAD_DIM && r.token < (int)lengths[r.b] ? load<IN_TYPE>(x, x_at(p, r, PER_HEAD) + channel + c) : 0.0f;
        });
    float *to = shares + ((i64)(blockIdx.x / TILES) * BITS + bit) * (HEAD_DIM + 1);
    sums.each([&](int b, int c, float sum) {
        if (bit + b < BITS && channel + c < HEAD_DIM) to[b * (HEAD_DIM + 1) + channel + c] = sum;
    });
    if (channel > 0) return;
    for (int b = threadIdx.x >> 5; b < M && bit + b < BITS; b += PRODUCT_THREADS / 32) {
        float sum = 0.0f;
        for (int step = threadIdx.x & 31; step < steps; step += 32) sum += of_row(b, step).y;
        sum = warp_sum(sum);
        if ((threadIdx.x & 31) == 0) to[b * (HEAD_DIM + 1) + HEAD_DIM] = sum;
    }
}
