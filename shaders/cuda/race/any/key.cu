// w = dα·R·φ of each key and bucket, from the gradient of the sums after its chunk and, but for ABSORB, the chunk's own
// later queries: a block per (chunk, tile of buckets).
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_key(const Piece p, const void *v, const float *alpha, const float *gains, const float *psi, const float *masses,
                                   const float *matrices, const float2 *heads, const u32 *lengths, float *w) {
    constexpr int N = tile_of(BUCKETS, MOST_COLUMNS);
    // Threads of a bucket, and tokens of each.
    constexpr int PARTS = PRODUCT_THREADS / N, SEGMENT = (CHUNK + PARTS - 1) / PARTS;
    __shared__ float room[OfRows<N>::ROOM], after[CHUNK][N + 1];
    Chunk at = chunk_of(p, lengths, tiles_of(BUCKETS, MOST_COLUMNS));
    int bucket = at.part * N;
    i64 x = x_at(p, at.r, 1);
    const float *matrix = matrices + at.matrix;
    {
        // The gradient of a key's mass is what its own query and the later ones leave.
        int s = threadIdx.x % N, part = threadIdx.x / N;
        bool real = part < PARTS && bucket + s < BUCKETS;
        float later[SEGMENT], rest = real ? matrix[(bucket + s) * COLUMNS + VALUE_DIM] : 0.0f;
#pragma unroll
        for (int i = 0; i < SEGMENT; i++) {
            later[i] = 0.0f;
#ifndef ABSORB
            int token = part * SEGMENT + i;
            if (!real || token >= at.count()) continue;
            for (int g = 0; g < GROUP; g++) later[i] += masses[((i64)row_of(p, at, token, GROUP) + g) * (BUCKETS + 1) + bucket + s];
#endif
        }
#pragma unroll
        for (int i = SEGMENT - 2; i >= 0; i--) later[i] += later[i + 1];
        if (part < PARTS) after[part][s] = later[0];
        barrier();
        for (int i = part + 1; i < PARTS; i++) rest += after[i][s];
        barrier();
#pragma unroll
        for (int i = 0; i < SEGMENT; i++) {
            if (part < PARTS && part * SEGMENT + i < CHUNK) after[part * SEGMENT + i][s] = later[i] + rest;
        }
    }
    OfRows<N> sums;
    sums.template add<true, true, (VALUE_DIM > SHORT)>(
        room, VALUE_DIM, [&](int i, int c) { return i < at.count() ? load_raw<IN_TYPE>(v, x + i * p.x_token + c) : 0.0f; },
        [&](int s, int c) { return bucket + s < BUCKETS ? matrix[(bucket + s) * COLUMNS + c] : 0.0f; }, Finite());
#ifndef ABSORB
    for (at.r.in_group = 0; at.r.in_group < GROUP; at.r.in_group++) {
        i64 first = row_of(p, at, 0, GROUP);
        u32 step = p.heads * GROUP;
        const float *of_gains = gains + first * CHUNK, *of_psi = psi + first * BUCKETS + bucket;
        sums.template add<false, false, (GROUP * CHUNK > SHORT)>(
            room, at.count(), [&](int key, int i) { return of_gains[i * (step * CHUNK) + key]; },
            [&](int s, int i) { return bucket + s < BUCKETS ? of_psi[i * (step * BUCKETS) + s] : 0.0f; });
    }
    at.r.in_group = 0;
#endif
    float centre = heads[p.head + at.r.head].y;
    i64 row0 = row_of(p, at, 0, 1);
    // Read before anything is written.
    sums.each([&](int i, int s, float &sum) {
        float weight = 0.0f;
        if (i < at.count() && bucket + s < BUCKETS) weight = alpha[(row0 + i * p.heads) * BUCKETS + bucket + s] + centre;
        sum = (sum + after[i][s]) * weight;
    });
    sums.pairs([&](int i, int s, float x, float y) {
        if (at.first + i < at.last && bucket + s < BUCKETS) put_pair<BUCKETS>(w + (row0 + i * p.heads) * BUCKETS + bucket + s, x, y, bucket + s + 1 < BUCKETS);
    });
}
