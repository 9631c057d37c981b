// From w = dα·R·φ (rows of W_ROW) to s_p = Σ_r w_r (c_rp − m_p): du = β·s·(1 − t²), and t·s, β's share: a thread per
// (row, bit).
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_through_hash(const Piece p, const float *w, const float *t, const float2 *heads, float2 *du) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.tokens * p.heads * PER_HEAD * BITS)) return;
    i64 row = at / BITS;
    int bit = at % BITS, plane = bit % PLANES;
    float beta = heads[p.head + place_of(p, row, PER_HEAD).head].x, x = t[at], mean = tanhf(beta * x), sum = 0.0f;
    const float *of_table = w + row * W_ROW + bit / PLANES * RADIX;
    for (int r = 0; r < RADIX; r++) sum += of_table[r] * (((r >> (PLANES - 1 - plane)) & 1 ? 1.0f : -1.0f) - mean);
    float2 pair = {beta * sum * (1.0f - x * x), x * sum};
    du[at] = pair;
}
