// Weights Ψ that queries give to the rows of the sums, from α in their place, and what is common to a row: a block per
// query. A query sees the sums before its chunk and the keys of the chunk up to its own; with READ the state alone.
//
// | | Ψ_s | last row | then |
// |---|---|---|---|
// | ratio | α_s | c·S | over Σ of all weights |
// | bucket | (α_s − c·δ_s) / F_s | c·Σ (α_s + c) / F_s | times a constant |
//
// F_s = c·n + Σ α_k,s + R·ε is R times the bucket's mass, δ_s = F_s / n − 1.
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_read_weights(const Piece p, const float *keys, const float *matrices, const float2 *heads, const u32 *lengths,
                                            float *psi, float *statistics) {
    __shared__ float parts[BLOCK];
    i64 row = blockIdx.x;
    Place r = place_of(p, row, GROUP);
    if (r.token >= (int)lengths[r.b]) return;
    float centre = heads[p.head + r.head].y;
    const float *matrix = matrices + matrix_at(p, r);
    float n = matrix[BUCKETS * COLUMNS + VALUE_DIM];
#ifndef READ
    n += r.token % CHUNK + 1;
#endif
    float found = 0.0f, entries = 0.0f, inverses = 0.0f;
    for (int s = threadIdx.x; s < BUCKETS; s += BLOCK) {
        float entry = matrix[s * COLUMNS + VALUE_DIM], mass = entry, alpha = psi[row * BUCKETS + s], weight = alpha;
#ifndef READ
        for (int i = r.token / CHUNK * CHUNK; i <= r.token; i++) mass += keys[key_row(p, r, i) * BUCKETS + s];
#endif
#ifndef RATIO
        float excess = mass + EPSILON, full = centre * n + excess;
        weight = (alpha - (n > 0.0f ? centre * excess / n : 0.0f)) / full;
        inverses += (alpha + centre) / full;
        psi[row * BUCKETS + s] = weight;
#endif
        found += weight * mass;
        entries += weight * entry;
    }
    found = block_sum(parts, found);
    entries = block_sum(parts, entries);
    inverses = block_sum(parts, inverses);
#ifdef RATIO
    float last = centre * BUCKETS, divisor = found + last * n;
    float factor = divisor > 0.0f ? 1.0f / divisor : 0.0f, whole = divisor > 0.0f ? 1.0f : 0.0f;
#else
    float last = centre * inverses, factor = p.scale, whole = p.scale * (BUCKETS - EPSILON * inverses);
#endif
    if (threadIdx.x == 0) {
        float *to = statistics + row * STATISTICS;
        to[0] = factor;
        to[1] = last;
        to[2] = whole;
        to[3] = entries;
    }
}
