// G·v of each query with the keys of its chunk up to its own, 0 else: a block per (chunk, head of the group).
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_gains(const Piece p, const void *grad_o, const void *v, const u32 *lengths, float *gains) {
    __shared__ float room[OfRows<CHUNK>::ROOM];
    Chunk at = chunk_of(p, lengths, GROUP);
    i64 x = y_at(p, at.r, 1);
    at.r.in_group = at.part;
    i64 g = x_at(p, at.r, GROUP);
    OfRows<CHUNK> sums;
    sums.template add<true, true, (VALUE_DIM > SHORT)>(
        room, VALUE_DIM, [&](int i, int c) { return i < at.count() ? load_raw<GRAD_TYPE>(grad_o, g + i * p.x_token + c) : 0.0f; },
        [&](int i, int c) { return i < at.count() ? load_raw<IN_TYPE>(v, x + i * p.y_token + c) : 0.0f; }, Finite(), Finite());
    sums.pairs([&](int i, int key, float x, float y) {
        if (at.first + i >= at.last) return;
        put_pair<CHUNK>(gains + (i64)row_of(p, at, i, GROUP) * CHUNK + key, key <= i && i < at.count() ? x : 0.0f, key < i && i < at.count() ? y : 0.0f, true);
    });
}
