// Outputs: a block per (chunk, head of the group, tile of channels). Where c = 1 values are taken from their mean, which
// all weights bring back. FLAG 1 adds to `sums` of earlier ensembles, FLAG 2 writes the result.
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_output(const Piece p, const void *v, const float *psi, const float *products, const float *statistics, const float *matrices,
                                      const float2 *heads, const u32 *lengths, float *sums, void *out) {
    constexpr int N = tile_of(VALUE_DIM, MOST_COLUMNS);
    __shared__ float room[OfRows<N>::ROOM], means[N];
    Chunk at = chunk_of(p, lengths, GROUP * tiles_of(VALUE_DIM, MOST_COLUMNS));
    int channel = at.part / GROUP * N;
    i64 x = x_at(p, at.r, 1) + channel;
    at.r.in_group = at.part % GROUP;
    const float *matrix = matrices + at.matrix + channel;
    float centre = heads[p.head + at.r.head].y, seen = matrices[at.matrix + BUCKETS * COLUMNS + VALUE_DIM];
    u32 first = row_of(p, at, 0, GROUP), step = p.heads * GROUP;
    i64 to = out_at(p, at.r, GROUP, VALUE_DIM) + channel;
    for (int c = threadIdx.x; c < N; c += PRODUCT_THREADS) {
        float mean = 0.0f;
        if (channel + c < VALUE_DIM && at.count() > 0) {
            if (seen > 0.0f) mean = centre * matrix[BUCKETS * COLUMNS + c] / seen;
#ifndef READ
            else mean = centre * load<IN_TYPE>(v, x + c);
#endif
        }
        means[c] = mean;
    }
    barrier();
    OfRows<N> found;
    found.template add<true, false>(
        room, BUCKETS, [&](int i, int s) { return i < at.count() ? psi[(i64)(first + i * step) * BUCKETS + s] : 0.0f; },
        [&](int c, int s) { return channel + c < VALUE_DIM ? matrix[s * COLUMNS + c] : 0.0f; });
#ifndef READ
    found.template add<true, false>(
        room, at.count(), [&](int i, int key) { return i < at.count() ? products[(i64)(first + i * step) * CHUNK + key] : 0.0f; },
        [&](int c, int i) { return channel + c < VALUE_DIM ? load<IN_TYPE>(v, x + i * p.x_token + c) - means[c] : 0.0f; });
#endif
    found.each([&](int i, int c, float sum) {
        if (at.first + i >= at.last || channel + c >= VALUE_DIM) return;
        i64 row = first + i * step;
        const float *of_row = statistics + row * STATISTICS;
        float o = 0.0f, mean = means[c];
        if (i < at.count()) {
            sum += of_row[1] * (matrix[BUCKETS * COLUMNS + c] - seen * mean) - of_row[3] * mean;
            o = sum * of_row[0] + of_row[2] * mean;
        }
#if ENSEMBLES > 1
        float *so_far = sums + row * VALUE_DIM + channel + c;
        if (p.flags & 1) o += *so_far;
        *so_far = o;
        o /= ENSEMBLES;
        if (!(p.flags & 2)) return;
#endif
        store<OUT_TYPE>(out, to + i * p.out_token + c, o);
    });
}
