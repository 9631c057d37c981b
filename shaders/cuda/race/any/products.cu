// Σ Ψ·α + last of each query with the keys of its chunk up to its own, 0 else: a block per (chunk, head of the group).
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_products(const Piece p, const float *psi, const float *keys, const float *statistics, const u32 *lengths, float *products) {
    __shared__ float room[OfRows<CHUNK>::ROOM], lasts[CHUNK];
    Chunk at = chunk_of(p, lengths, GROUP);
    const float *of_keys = keys + (i64)row_of(p, at, 0, 1) * BUCKETS;
    at.r.in_group = at.part;
    u32 first = row_of(p, at, 0, GROUP), step = p.heads * GROUP;
    for (int i = threadIdx.x; i < at.count(); i += PRODUCT_THREADS) lasts[i] = statistics[(i64)(first + i * step) * STATISTICS + 1];
    const float *of_psi = psi + (i64)first * BUCKETS;
    OfRows<CHUNK> sums;
    sums.template add<true, true, (BUCKETS > SHORT)>(
        room, BUCKETS, [&](int i, int s) { return i < at.count() ? of_psi[i * (step * BUCKETS) + s] : 0.0f; },
        [&](int i, int s) { return i < at.count() ? of_keys[i * (p.heads * BUCKETS) + s] : 0.0f; });
    sums.pairs([&](int i, int key, float x, float y) {
        if (at.first + i >= at.last) return;
        float last = lasts[i];
        put_pair<CHUNK>(products + (i64)(first + i * step) * CHUNK + key, key <= i && i < at.count() ? x + last : 0.0f, key < i && i < at.count() ? y + last : 0.0f, true);
    });
}
