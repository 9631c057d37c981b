// Backward of a read: a block per query. From `values` (any_values) and α in `psi` it makes w = dα·R·φ in the place of
// the values, in that of α what multiplies G in the gradient of the sums, `masses` that of their mass column; both have
// the row of sums last. Statistics take the last of what multiplies G, for any_products.
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_query(const Piece p, const float *keys, const float *matrices, const float2 *heads, const u32 *lengths, float *values,
                                     float *psi, float *masses, float *statistics) {
    __shared__ float parts[BLOCK];
    i64 row = blockIdx.x;
    Place r = place_of(p, row, GROUP);
    float *value = values + row * (BUCKETS + 1), *of_mass = masses + row * (BUCKETS + 1), *alphas = psi + row * BUCKETS;
    if (r.token >= (int)lengths[r.b]) {
        for (int s = threadIdx.x; s <= BUCKETS; s += BLOCK) {
            value[s] = of_mass[s] = 0.0f;
            if (s < BUCKETS) alphas[s] = 0.0f;
        }
        if (threadIdx.x == 0) statistics[row * STATISTICS + 1] = 0.0f;
        return;
    }
    float centre = heads[p.head + r.head].y;
    const float *matrix = matrices + matrix_at(p, r);
    float n = matrix[BUCKETS * COLUMNS + VALUE_DIM];
#ifndef READ
    n += r.token % CHUNK + 1;
#endif
    float gain = value[BUCKETS], first = 0.0f, second = 0.0f;
    for (int s = threadIdx.x; s < BUCKETS; s += BLOCK) {
        float mass = matrix[s * COLUMNS + VALUE_DIM], alpha = alphas[s];
#ifndef READ
        for (int i = r.token / CHUNK * CHUNK; i <= r.token; i++) mass += keys[key_row(p, r, i) * BUCKETS + s];
#endif
#ifdef RATIO
        first += alpha * mass;
        second += alpha * value[s];
        of_mass[s] = mass;
#else
        float floor = n + EPSILON, inverse = 1.0f / (centre * n + mass + EPSILON), tilt = centre * mass / floor;
        float dalpha = (value[s] - tilt * gain) * inverse, share = (alpha + centre) * inverse, excess = (alpha - tilt) * inverse;
        float dmass = -(dalpha * share + centre * gain / floor * excess);
        first += share;
        second += dmass;
        value[s] = dalpha * (alpha + centre);
        of_mass[s] = dmass;
        alphas[s] = p.scale * excess;
#endif
    }
    first = block_sum(parts, first);
    second = block_sum(parts, second);
#ifdef RATIO
    float all = centre * BUCKETS, divisor = first + all * n;
    float inverse = divisor > 0.0f ? 1.0f / divisor : 0.0f, dmass = -(second + all * gain) * inverse * inverse;
    for (int s = threadIdx.x; s < BUCKETS; s += BLOCK) {
        float alpha = alphas[s];
        value[s] = (value[s] * inverse + dmass * of_mass[s]) * (alpha + centre);
        of_mass[s] = alpha * dmass;
        alphas[s] = p.scale * alpha * inverse;
    }
    float last = p.scale * all * inverse, last_mass = all * dmass;
#else
    float floor = n + EPSILON;
    float last = p.scale * centre * first, last_mass = centre * (second - BUCKETS * gain / (floor * floor));
#endif
    if (threadIdx.x == 0) {
        of_mass[BUCKETS] = last_mass;
        statistics[row * STATISTICS + 1] = last;
    }
}
