// What the queries of a chunk give to the gradient of the sums that they read: a block per (chunk, tile of the matrix).
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_query_sums(const Piece p, const void *grad_o, const float *psi, const float *masses, const float *statistics,
                                          const u32 *lengths, float *matrices) {
    constexpr int M = tile_of(BUCKETS + 1, MOST_ROWS), N = wide_tile(VALUE_DIM), ROW_TILES = tiles_of(BUCKETS + 1, MOST_ROWS);
    __shared__ float room[OfBuckets<M, N>::ROOM];
    Chunk at = chunk_of(p, lengths, ROW_TILES * tiles_of(VALUE_DIM, MOST_COLUMNS));
    int bucket = at.part % ROW_TILES * M, channel = at.part / ROW_TILES * N;
    OfBuckets<M, N> sums;
    for (at.r.in_group = 0; at.r.in_group < GROUP; at.r.in_group++) {
        i64 from = x_at(p, at.r, GROUP);
        i64 first = row_of(p, at, 0, GROUP);
        u32 step = p.heads * GROUP;
        const float *of_psi = psi + first * BUCKETS + bucket, *of_last = statistics + first * STATISTICS + 1;
        sums.template add<false, false, (GROUP * CHUNK > SHORT)>(
            room, at.count(),
            [&](int s, int i) {
                return bucket + s < BUCKETS ? of_psi[i * (step * BUCKETS) + s] : bucket + s == BUCKETS ? of_last[i * (step * STATISTICS)] : 0.0f;
            },
            [&](int c, int i) { return channel + c < VALUE_DIM ? load_raw<GRAD_TYPE>(grad_o, from + i * p.x_token + channel + c) : 0.0f; }, AsItIs(), Finite());
    }
    float *to = matrices + at.matrix;
    sums.each([&](int s, int c, float sum) {
        if (bucket + s <= BUCKETS && channel + c < VALUE_DIM) to[(bucket + s) * COLUMNS + channel + c] = sum;
    });
    if (channel > 0) return;
    at.r.in_group = 0;
    u32 first = row_of(p, at, 0, GROUP), step = p.heads * GROUP;
    sum_rows<M>(
        room, at.count() * GROUP, [&](int s, int i) { return bucket + s <= BUCKETS ? masses[(i64)(first + i / GROUP * step + i % GROUP) * (BUCKETS + 1) + bucket + s] : 0.0f; },
        [&](int s, float sum) {
            if (bucket + s <= BUCKETS) to[(bucket + s) * COLUMNS + VALUE_DIM] = sum;
        });
}
