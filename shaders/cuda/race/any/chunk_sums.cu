// [α, 1]ᵀ[v, 1] of the keys of each chunk: a block per (chunk, tile of the matrix).
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_chunk_sums(const Piece p, const void *v, const float *alpha, const u32 *lengths, float *matrices) {
    constexpr int M = tile_of(BUCKETS + 1, MOST_ROWS), N = wide_tile(VALUE_DIM), ROW_TILES = tiles_of(BUCKETS + 1, MOST_ROWS);
    __shared__ float room[OfBuckets<M, N>::ROOM];
    Chunk at = chunk_of(p, lengths, ROW_TILES * tiles_of(VALUE_DIM, MOST_COLUMNS));
    int bucket = at.part % ROW_TILES * M, channel = at.part / ROW_TILES * N;
    const float *weights = alpha + (i64)row_of(p, at, 0, 1) * BUCKETS;
    i64 from = x_at(p, at.r, 1);
    auto weight = [&](int s, int i) { return bucket + s < BUCKETS ? weights[(u32)i * p.heads * BUCKETS + bucket + s] : bucket + s == BUCKETS ? 1.0f : 0.0f; };
    OfBuckets<M, N> sums;
    sums.template add<false, false>(room, at.count(), weight, [&](int c, int i) { return channel + c < VALUE_DIM ? load_raw<IN_TYPE>(v, from + i * p.x_token + channel + c) : 0.0f; }, AsItIs(), Finite());
    float *to = matrices + at.matrix;
    sums.each([&](int s, int c, float sum) {
        if (bucket + s <= BUCKETS && channel + c < VALUE_DIM) to[(bucket + s) * COLUMNS + channel + c] = sum;
    });
    if (channel > 0) return;
    sum_rows<M>(room, at.count(), weight, [&](int s, float sum) {
        if (bucket + s <= BUCKETS) to[(bucket + s) * COLUMNS + VALUE_DIM] = sum;
    });
}
