// t = tanh(W·x) of queries or keys and α of it, 0 of padding: a block per (chunk, head of the group, tile of tables).
#include "product.cuh"

constexpr int TABLES_AT_ONCE = TABLES < MOST_COLUMNS / PLANES ? TABLES : MOST_COLUMNS / PLANES < 1 ? 1 : MOST_COLUMNS / PLANES;
constexpr int TABLE_TILES = (TABLES + TABLES_AT_ONCE - 1) / TABLES_AT_ONCE;
constexpr int BITS_AT_ONCE = TABLES_AT_ONCE * PLANES;
constexpr int BITS_TILE = (BITS_AT_ONCE + 15) / 16 * 16;
// Rows whose odds are in shared memory at a time.
constexpr int ROWS_AT_ONCE = BITS_AT_ONCE <= 64 ? 32 : 16;

extern "C" __global__ void __launch_bounds__(PRODUCT_THREADS, PRODUCT_BLOCKS) any_hash(const Piece p, const void *x, const float *planes, const float2 *heads, const u32 *lengths, float *t, float *alpha) {
    __shared__ float room[OfRows<BITS_TILE>::ROOM];
    __shared__ float2 odds[ROWS_AT_ONCE * BITS_AT_ONCE];
    Chunk at = chunk_of(p, lengths, PER_HEAD * TABLE_TILES);
    at.r.in_group = at.part % PER_HEAD;
    int table = at.part / PER_HEAD * TABLES_AT_ONCE, bits = TABLES - table < TABLES_AT_ONCE ? (TABLES - table) * PLANES : BITS_AT_ONCE;
    const float *w = planes + (p.head + at.r.head) * p.planes_step + (i64)table * PLANES * HEAD_DIM;
    i64 from = x_at(p, at.r, PER_HEAD);
    OfRows<BITS_TILE> of_bits;
    of_bits.template add<true, true, (HEAD_DIM > SHORT)>(
        room, HEAD_DIM, [&](int i, int c) { return i < at.count() ? load_raw<IN_TYPE>(x, from + i * p.x_token + c) : 0.0f; },
        [&](int bit, int c) { return bit < bits ? w[bit * HEAD_DIM + c] : 0.0f; }, Finite());
    float beta = heads[p.head + at.r.head].x, centre = heads[p.head + at.r.head].y;
    int rows = at.last - at.first;
    for (int first = 0; first < CHUNK; first += ROWS_AT_ONCE) {
        barrier();
        of_bits.each([&](int i, int bit, float sum) {
            if (i < first || i >= first + ROWS_AT_ONCE || bit >= bits) return;
            float of_bit = tanhf(sum), z = 2.0f * beta * of_bit;
            // 2·σ(−z) and 2·σ(z), to their own relative precision.
            float e = expf(-fabsf(z)), large = 2.0f / (1.0f + e), small = e * large;
            float2 pair = {z > 0.0f ? small : large, z > 0.0f ? large : small};
            odds[(i - first) * BITS_AT_ONCE + bit] = pair;
            if (i < rows) t[(i64)row_of(p, at, i, PER_HEAD) * BITS + table * PLANES + bit] = of_bit;
        });
        barrier();
        constexpr int BUCKETS_AT_ONCE = TABLES_AT_ONCE * RADIX;
        for (int e = threadIdx.x; e < ROWS_AT_ONCE * BUCKETS_AT_ONCE; e += PRODUCT_THREADS) {
            int i = e / BUCKETS_AT_ONCE, bucket = e % BUCKETS_AT_ONCE;
            if (first + i >= rows) break;
            if (bucket >= bits / PLANES * RADIX) continue;
            const float2 *of_table = odds + i * BITS_AT_ONCE + bucket / RADIX * PLANES;
            float weight = 1.0f;
#pragma unroll
            for (int plane = 0; plane < PLANES; plane++) weight *= (bucket >> (PLANES - 1 - plane)) & 1 ? of_table[plane].y : of_table[plane].x;
            alpha[(i64)row_of(p, at, first + i, PER_HEAD) * BUCKETS + table * RADIX + bucket] = first + i < at.count() ? weight - centre : 0.0f;
        }
    }
}
