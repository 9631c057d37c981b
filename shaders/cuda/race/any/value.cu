// dv: a block per (chunk, tile of channels). FLAG 1 adds to what earlier ensembles gave.
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_value(const Piece p, const void *grad_o, const float *alpha, const float *products, const float *matrices,
                                     const u32 *lengths, float *dv) {
    constexpr int N = tile_of(VALUE_DIM, MOST_COLUMNS);
    __shared__ float room[OfRows<N>::ROOM], lasts[N];
    Chunk at = chunk_of(p, lengths, tiles_of(VALUE_DIM, MOST_COLUMNS));
    int channel = at.part * N;
    const float *matrix = matrices + at.matrix + channel, *weights = alpha + (i64)row_of(p, at, 0, 1) * BUCKETS;
    i64 to = out_at(p, at.r, 1, VALUE_DIM) + channel;
    for (int c = threadIdx.x; c < N; c += PRODUCT_THREADS) lasts[c] = channel + c < VALUE_DIM ? matrix[BUCKETS * COLUMNS + c] : 0.0f;
    OfRows<N> sums;
    sums.template add<true, false, (BUCKETS > SHORT)>(
        room, BUCKETS, [&](int i, int s) { return i < at.count() ? weights[i * (p.heads * BUCKETS) + s] : 0.0f; },
        [&](int c, int s) { return channel + c < VALUE_DIM ? matrix[s * COLUMNS + c] : 0.0f; });
#ifndef ABSORB
    for (at.r.in_group = 0; at.r.in_group < GROUP; at.r.in_group++) {
        i64 g = x_at(p, at.r, GROUP) + channel;
        const float *of_products = products + (i64)row_of(p, at, 0, GROUP) * CHUNK;
        u32 step = p.heads * GROUP * CHUNK;
        sums.template add<false, false, (GROUP * CHUNK > SHORT)>(
            room, at.count(), [&](int key, int i) { return of_products[i * step + key]; },
            [&](int c, int i) { return channel + c < VALUE_DIM ? load_raw<GRAD_TYPE>(grad_o, g + i * p.x_token + c) : 0.0f; }, AsItIs(), Finite());
    }
#endif
    sums.pairs([&](int i, int c, float x, float y) {
        if (at.first + i >= at.last || channel + c >= VALUE_DIM) return;
        float *here = dv + to + i * p.out_token + c;
        bool both = channel + c + 1 < VALUE_DIM, real = i < at.count();
        x = real ? x + lasts[c] : 0.0f;
        y = real ? y + lasts[c + 1] : 0.0f;
        if (p.flags & 1) {
            x += here[0];
            if (both) y += here[1];
        }
        put_pair<VALUE_DIM>(here, x, y, both);
    });
}
