// Outputs: a block per (chunk, head of the group, tile of channels). Where c = 1 values are taken from their mean, which
// all weights bring back. FLAG 1 adds to `sums` of earlier ensembles, FLAG 2 writes the result.
#include "product.cuh"

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_output(const Piece p, const void *v, const float *psi, const float *products, const float *statistics, const float *matrices,
                                      const float2 *heads, const u32 *lengths, float *sums, void *out) {
    constexpr int N = tile_of(VALUE_DIM, MOST_COLUMNS);
    __shared__ float room[OfRows<N>::ROOM], means[N], lasts[N];
    // Of padding they are zero.
    __shared__ float4 rows[CHUNK];
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
        lasts[c] = channel + c < VALUE_DIM ? matrix[BUCKETS * COLUMNS + c] - seen * mean : 0.0f;
    }
    for (int i = threadIdx.x; i < CHUNK; i += PRODUCT_THREADS) {
        float4 none = {0.0f, 0.0f, 0.0f, 0.0f};
        rows[i] = i < at.count() ? *(const float4 *)(statistics + (i64)(first + i * step) * STATISTICS) : none;
    }
    barrier();
    const float *of_psi = psi + (i64)first * BUCKETS;
    OfRows<N> found;
    found.template add<true, false, (BUCKETS > SHORT)>(
        room, BUCKETS, [&](int i, int s) { return i < at.count() ? of_psi[i * (step * BUCKETS) + s] : 0.0f; },
        [&](int c, int s) { return channel + c < VALUE_DIM ? matrix[s * COLUMNS + c] : 0.0f; });
#ifndef READ
    const float *of_products = products + (i64)first * CHUNK;
    found.template add<true, false>(
        room, at.count(), [&](int i, int key) { return i < at.count() ? of_products[i * (step * CHUNK) + key] : 0.0f; },
        [&](int c, int i) { return channel + c < VALUE_DIM ? load_raw<IN_TYPE>(v, x + i * p.x_token + c) : 0.0f; }, AsItIs(), [&](int c, float x) { return finite_or_zero(x) - means[c]; });
#endif
    found.pairs([&](int i, int c, float x, float y) {
        if (at.first + i >= at.last || channel + c >= VALUE_DIM) return;
        bool both = channel + c + 1 < VALUE_DIM;
        float4 of_row = rows[i];
        x = (x + of_row.y * lasts[c] - of_row.w * means[c]) * of_row.x + of_row.z * means[c];
        y = (y + of_row.y * lasts[c + 1] - of_row.w * means[c + 1]) * of_row.x + of_row.z * means[c + 1];
#if ENSEMBLES > 1
        float *so_far = sums + (i64)(first + i * step) * VALUE_DIM + channel + c;
        if (p.flags & 1) {
            x += so_far[0];
            if (both) y += so_far[1];
        }
        put_pair<VALUE_DIM>(so_far, x, y, both);
        x /= ENSEMBLES;
        y /= ENSEMBLES;
        if (!(p.flags & 2)) return;
#endif
        i64 here = to + i * p.out_token + c;
        if constexpr (OUT_TYPE == F32) {
            put_pair<VALUE_DIM>((float *)out + here, x, y, both);
        } else {
            store<OUT_TYPE>(out, here, x);
            if (both) store<OUT_TYPE>(out, here + 1, y);
        }
    });
}
