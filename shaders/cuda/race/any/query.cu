// Backward of a read: a block per (chunk, head of the group). From `values` (any_values) and α in `psi` it makes
// w = dα·R·φ in the place of the values, in that of α what multiplies G in the gradient of the sums, `masses` that of
// their mass column; both have the row of sums last. Statistics take the last of what multiplies G, for any_products.
#include "masses.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_query(const Piece p, const float *keys, const float *matrices, const float2 *heads, const u32 *lengths, float *values,
                                     float *psi, float *masses, float *statistics) {
    __shared__ Masses found;
    Chunk at = chunk_of(p, lengths, GROUP);
    at.r.in_group = at.part;
    float centre = heads[p.head + at.r.head].y;
    const float *matrix = matrices + at.matrix;
    float before = matrix[BUCKETS * COLUMNS + VALUE_DIM];
    int lane = threadIdx.x & 31, own = (threadIdx.x >> 5) * OWN_QUERIES;
    auto seen = [&](int i) {
#ifdef READ
        return before;
#else
        return before + (float)(i + 1);
#endif
    };
    float first[OWN_QUERIES], second[OWN_QUERIES];
#pragma unroll
    for (int r = 0; r < OWN_QUERIES; r++) first[r] = second[r] = 0.0f;
    for (int bucket = 0; bucket < BUCKETS; bucket += SLICE_BUCKETS) {
        find_masses(found, p, at, keys, matrix, bucket);
#pragma unroll
        for (int r = 0; r < OWN_QUERIES; r++) {
            int i = own + r;
            if (at.first + i >= at.last) break;
            i64 row = row_of(p, at, i, GROUP);
            float *value = values + row * (BUCKETS + 1), *of_mass = masses + row * (BUCKETS + 1), *alphas = psi + row * BUCKETS;
            bool real = i < at.count();
#ifndef RATIO
            float gain = value[BUCKETS], n = seen(i);
#endif
            for (int s = bucket + lane; s < bucket + SLICE_BUCKETS && s < BUCKETS; s += 32) {
                if (!real) {
                    value[s] = of_mass[s] = alphas[s] = 0.0f;
                    continue;
                }
                float mass = found.of[i][s - bucket], alpha = alphas[s];
#ifdef RATIO
                first[r] += alpha * mass;
                second[r] += alpha * value[s];
                of_mass[s] = mass;
#else
                float floor = n + EPSILON, inverse = 1.0f / (centre * n + mass + EPSILON), tilt = centre * mass / floor;
                float dalpha = (value[s] - tilt * gain) * inverse, share = (alpha + centre) * inverse, excess = (alpha - tilt) * inverse;
                float dmass = -(dalpha * share + centre * gain / floor * excess);
                first[r] += share;
                second[r] += dmass;
                value[s] = dalpha * (alpha + centre);
                of_mass[s] = dmass;
                alphas[s] = p.scale * excess;
#endif
            }
        }
    }
#pragma unroll
    for (int r = 0; r < OWN_QUERIES; r++) {
        int i = own + r;
        if (at.first + i >= at.last) break;
        i64 row = row_of(p, at, i, GROUP);
        float *value = values + row * (BUCKETS + 1), *of_mass = masses + row * (BUCKETS + 1);
        float last = 0.0f, last_mass = 0.0f;
        if (i < at.count()) {
            float gain = value[BUCKETS], n = seen(i), of_first = warp_sum(first[r]), of_second = warp_sum(second[r]);
#ifdef RATIO
            float *alphas = psi + row * BUCKETS, all = centre * BUCKETS, divisor = of_first + all * n;
            float inverse = divisor > 0.0f ? 1.0f / divisor : 0.0f, dmass = -(of_second + all * gain) * inverse * inverse;
            for (int s = lane; s < BUCKETS; s += 32) {
                float alpha = alphas[s];
                value[s] = (value[s] * inverse + dmass * of_mass[s]) * (alpha + centre);
                of_mass[s] = alpha * dmass;
                alphas[s] = p.scale * alpha * inverse;
            }
            last = p.scale * all * inverse;
            last_mass = all * dmass;
#else
            float floor = n + EPSILON;
            last = p.scale * centre * of_first;
            last_mass = centre * (of_second - BUCKETS * gain / (floor * floor));
#endif
        } else if (lane == 0) {
            value[BUCKETS] = 0.0f;
        }
        if (lane == 0) {
            of_mass[BUCKETS] = last_mass;
            statistics[row * STATISTICS + 1] = last;
        }
    }
}
