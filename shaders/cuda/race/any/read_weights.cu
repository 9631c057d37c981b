// Weights Ψ that queries give to the rows of the sums, from α in their place, and what is common to a row: a block per
// (chunk, head of the group). A query sees the sums before its chunk and the keys of the chunk up to its own; with READ
// the state alone.
//
// | | Ψ_s | last row | then |
// |---|---|---|---|
// | ratio | α_s | c·S | over Σ of all weights |
// | bucket | (α_s − c·δ_s) / F_s | c·Σ (α_s + c) / F_s | times a constant |
//
// F_s = c·n + Σ α_k,s + R·ε is R times the bucket's mass, δ_s = F_s / n − 1.
#include "masses.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_read_weights(const Piece p, const float *keys, const float *matrices, const float2 *heads, const u32 *lengths,
                                            float *psi, float *statistics) {
    __shared__ Masses masses;
    Chunk at = chunk_of(p, lengths, GROUP);
    at.r.in_group = at.part;
    float centre = heads[p.head + at.r.head].y;
    const float *matrix = matrices + at.matrix;
    float before = matrix[BUCKETS * COLUMNS + VALUE_DIM];
    int lane = threadIdx.x & 31, first = (threadIdx.x >> 5) * OWN_QUERIES;
    // Keys that a query sees.
    auto seen = [&](int i) {
#ifdef READ
        return before;
#else
        return before + (float)(i + 1);
#endif
    };
    float found[OWN_QUERIES] = {}, entries[OWN_QUERIES] = {};
#ifndef RATIO
    float inverses[OWN_QUERIES] = {};
#endif
    for (int bucket = 0; bucket < BUCKETS; bucket += SLICE_BUCKETS) {
        find_masses(masses, p, at, keys, matrix, bucket);
#pragma unroll
        for (int r = 0; r < OWN_QUERIES; r++) {
            int i = first + r;
            if (i >= at.count()) break;
            float *weights = psi + (i64)row_of(p, at, i, GROUP) * BUCKETS + bucket;
            for (int s = lane; s < SLICE_BUCKETS && bucket + s < BUCKETS; s += 32) {
                float mass = masses.of[i][s], weight = weights[s];
#ifndef RATIO
                float n = seen(i), excess = mass + EPSILON, full = centre * n + excess;
                inverses[r] += (weight + centre) / full;
                weight = (weight - (n > 0.0f ? centre * excess / n : 0.0f)) / full;
                weights[s] = weight;
#endif
                found[r] += weight * mass;
                entries[r] += weight * masses.entries[s];
            }
        }
    }
#pragma unroll
    for (int r = 0; r < OWN_QUERIES; r++) {
        int i = first + r;
        if (i >= at.count()) break;
        float all_found = warp_sum(found[r]), all_entries = warp_sum(entries[r]);
#ifdef RATIO
        float last = centre * BUCKETS, divisor = all_found + last * seen(i);
        float factor = divisor > 0.0f ? 1.0f / divisor : 0.0f, whole = divisor > 0.0f ? 1.0f : 0.0f;
#else
        float all_inverses = warp_sum(inverses[r]);
        float last = centre * all_inverses, factor = p.scale, whole = p.scale * (BUCKETS - EPSILON * all_inverses);
#endif
        if (lane == 0) {
            float *to = statistics + (i64)row_of(p, at, i, GROUP) * STATISTICS;
            to[0] = factor;
            to[1] = last;
            to[2] = whole;
            to[3] = all_entries;
        }
    }
}
