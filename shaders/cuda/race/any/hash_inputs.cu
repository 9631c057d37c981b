// dq or dk = Wᵀ·du: a block per (chunk, head of the group, tile of channels). FLAG 1 adds to what earlier ensembles gave.
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_hash_inputs(const Piece p, const float2 *du, const float *planes, const u32 *lengths, float *dx) {
    constexpr int N = tile_of(HEAD_DIM, MOST_COLUMNS);
    __shared__ float room[OfRows<N>::ROOM];
    Chunk at = chunk_of(p, lengths, PER_HEAD * tiles_of(HEAD_DIM, MOST_COLUMNS));
    int channel = at.part / PER_HEAD * N;
    at.r.in_group = at.part % PER_HEAD;
    const float *w = planes + (p.head + at.r.head) * p.planes_step + channel;
    const float2 *of_rows = du + (i64)row_of(p, at, 0, PER_HEAD) * BITS;
    i64 to = out_at(p, at.r, PER_HEAD, HEAD_DIM) + channel;
    OfRows<N> sums;
    sums.template add<true, false, (BITS > SHORT)>(
        room, BITS, [&](int i, int bit) { return i < at.count() ? of_rows[i * (p.heads * PER_HEAD * BITS) + bit].x : 0.0f; },
        [&](int c, int bit) { return channel + c < HEAD_DIM ? w[bit * HEAD_DIM + c] : 0.0f; });
    sums.pairs([&](int i, int c, float x, float y) {
        if (at.first + i >= at.last || channel + c >= HEAD_DIM) return;
        float *here = dx + to + i * p.out_token + c;
        bool both = channel + c + 1 < HEAD_DIM;
        if (p.flags & 1) {
            x += here[0];
            if (both) y += here[1];
        }
        put_pair<HEAD_DIM>(here, x, y, both);
    });
}
