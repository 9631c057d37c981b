// Σ Ψ·α + last of each query with the keys of its chunk up to its own, 0 else: a block per (chunk, head of the group).
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_products(const Piece p, const float *psi, const float *keys, const float *statistics, const u32 *lengths, float *products) {
    __shared__ float room[OfRows<CHUNK>::ROOM];
    Chunk at = chunk_of(p, lengths, GROUP);
    i64 of_keys = (i64)row_of(p, at, 0, 1) * BUCKETS;
    at.r.in_group = at.part;
    u32 first = row_of(p, at, 0, GROUP), step = p.heads * GROUP;
    OfRows<CHUNK> sums;
    sums.template add<true, true>(
        room, BUCKETS, [&](int i, int s) { return i < at.count() ? psi[(i64)(first + i * step) * BUCKETS + s] : 0.0f; },
        [&](int i, int s) { return i < at.count() ? keys[of_keys + (i64)(i * p.heads) * BUCKETS + s] : 0.0f; });
    sums.each([&](int i, int key, float sum) {
        if (at.first + i >= at.last) return;
        i64 row = first + i * step;
        products[row * CHUNK + key] = key <= i && i < at.count() ? sum + statistics[row * STATISTICS + 1] : 0.0f;
    });
}
