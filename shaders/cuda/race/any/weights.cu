// α of queries or keys, 0 of padding: a thread per (row, bucket).
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_weights(const Piece p, const float *t, const float2 *heads, const u32 *lengths, float *alpha) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.tokens * p.heads * PER_HEAD * BUCKETS)) return;
    Place r = place_of(p, at / BUCKETS, PER_HEAD);
    int bucket = at % BUCKETS;
    float beta = heads[p.head + r.head].x, weight = 1.0f;
    const float *of_table = t + at / BUCKETS * BITS + bucket / RADIX * PLANES;
    for (int plane = 0; plane < PLANES; plane++) {
        float z = 2.0f * beta * of_table[plane];
        z = (bucket >> (PLANES - 1 - plane)) & 1 ? z : -z;
        // 2·σ(z), to its own relative precision.
        float e = expf(-fabsf(z));
        weight *= (z > 0.0f ? 2.0f : 2.0f * e) / (1.0f + e);
    }
    alpha[at] = r.token < (int)lengths[r.b] ? weight - heads[p.head + r.head].y : 0.0f;
}
