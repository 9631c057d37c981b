// w = dα·R·φ of each key and bucket, from the gradient of the sums after its chunk and, but for ABSORB, the chunk's own
// later queries: a block per (chunk, tile of buckets).
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_key(const Piece p, const void *v, const float *alpha, const float *gains, const float *psi, const float *masses,
                                   const float *matrices, const float2 *heads, const u32 *lengths, float *w) {
    constexpr int N = tile_of(BUCKETS, MOST_COLUMNS);
    __shared__ float room[OfRows<N>::ROOM], masses_after[N];
    Chunk at = chunk_of(p, lengths, tiles_of(BUCKETS, MOST_COLUMNS));
    int bucket = at.part * N;
    i64 x = x_at(p, at.r, 1);
    const float *matrix = matrices + at.matrix;
    for (int s = threadIdx.x; s < N; s += PRODUCT_THREADS) masses_after[s] = bucket + s < BUCKETS ? matrix[(bucket + s) * COLUMNS + VALUE_DIM] : 0.0f;
    OfRows<N> sums;
    sums.template add<true, true, (VALUE_DIM > SHORT)>(
        room, VALUE_DIM, [&](int i, int c) { return i < at.count() ? load<IN_TYPE>(v, x + i * p.x_token + c) : 0.0f; },
        [&](int s, int c) { return bucket + s < BUCKETS ? matrix[(bucket + s) * COLUMNS + c] : 0.0f; });
#ifndef ABSORB
    for (at.r.in_group = 0; at.r.in_group < GROUP; at.r.in_group++) {
        u32 first = row_of(p, at, 0, GROUP), step = p.heads * GROUP;
        sums.template add<false, false, (GROUP * CHUNK > SHORT)>(
            room, at.count(), [&](int key, int i) { return gains[(i64)(first + i * step) * CHUNK + key]; },
            [&](int s, int i) { return bucket + s < BUCKETS ? psi[(i64)(first + i * step) * BUCKETS + bucket + s] : 0.0f; });
        sums.template add<false, false, (GROUP * CHUNK > SHORT)>(
            room, at.count(), [&](int key, int i) { return key <= i ? 1.0f : 0.0f; },
            [&](int s, int i) { return bucket + s < BUCKETS ? masses[(i64)(first + i * step) * (BUCKETS + 1) + bucket + s] : 0.0f; });
    }
    at.r.in_group = 0;
#endif
    float centre = heads[p.head + at.r.head].y;
    i64 row0 = row_of(p, at, 0, 1);
    // Read before anything is written.
    sums.each([&](int i, int s, float &sum) {
        float weight = 0.0f;
        if (i < at.count() && bucket + s < BUCKETS) weight = alpha[(row0 + i * p.heads) * BUCKETS + bucket + s] + centre;
        sum = (sum + masses_after[s]) * weight;
    });
    sums.pairs([&](int i, int s, float x, float y) {
        if (at.first + i < at.last && bucket + s < BUCKETS) put_pair<BUCKETS>(w + (row0 + i * p.heads) * BUCKETS + bucket + s, x, y, bucket + s + 1 < BUCKETS);
    });
}
