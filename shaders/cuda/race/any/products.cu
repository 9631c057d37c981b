// Σ Ψ·α + last of each query with the keys of its chunk up to its own, 0 else: a thread per (query, key).
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_products(const Piece p, const float *psi, const float *keys, const float *statistics, const u32 *lengths, float *products) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.tokens * p.heads * GROUP * CHUNK)) return;
    i64 row = at / CHUNK;
    Place r = place_of(p, row, GROUP);
    int token = r.token / CHUNK * CHUNK + at % CHUNK;
    float sum = 0.0f;
    if (token <= r.token && r.token < (int)lengths[r.b]) {
        const float *key = keys + key_row(p, r, token) * BUCKETS, *query = psi + row * BUCKETS;
        for (int s = 0; s < BUCKETS; s++) sum += query[s] * key[s];
        sum += statistics[row * STATISTICS + 1];
    }
    products[at] = sum;
}
