// G·M + Σ (G·v)·α of each query and bucket, the row of sums included as the last: a block per (chunk, head of the group,
// tile of buckets).
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_values(const Piece p, const void *grad_o, const float *gains, const float *keys, const float *matrices, const u32 *lengths,
                                      float *values) {
    constexpr int N = tile_of(BUCKETS + 1, MOST_COLUMNS);
    __shared__ float room[OfRows<N>::ROOM];
    Chunk at = chunk_of(p, lengths, GROUP * tiles_of(BUCKETS + 1, MOST_COLUMNS));
    int bucket = at.part / GROUP * N;
    const float *of_keys = keys + (i64)row_of(p, at, 0, 1) * BUCKETS;
    at.r.in_group = at.part % GROUP;
    i64 g = x_at(p, at.r, GROUP);
    const float *matrix = matrices + at.matrix;
    const float *of_gains = gains + (i64)row_of(p, at, 0, GROUP) * CHUNK;
    OfRows<N> sums;
    sums.template add<true, true, (VALUE_DIM > SHORT)>(
        room, VALUE_DIM, [&](int i, int c) { return i < at.count() ? load_raw<GRAD_TYPE>(grad_o, g + i * p.x_token + c) : 0.0f; },
        [&](int s, int c) { return bucket + s <= BUCKETS ? matrix[(bucket + s) * COLUMNS + c] : 0.0f; }, Finite());
#ifndef READ
    sums.template add<true, false>(
        room, at.count(), [&](int i, int key) { return i < at.count() ? of_gains[i * (p.heads * GROUP * CHUNK) + key] : 0.0f; },
        [&](int s, int i) { return bucket + s < BUCKETS ? of_keys[i * (p.heads * BUCKETS) + bucket + s] : bucket + s == BUCKETS ? 1.0f : 0.0f; });
#endif
    sums.each([&](int i, int s, float sum) {
        if (at.first + i < at.last && bucket + s <= BUCKETS) values[(i64)row_of(p, at, i, GROUP) * (BUCKETS + 1) + bucket + s] = sum * p.scale;
    });
}
