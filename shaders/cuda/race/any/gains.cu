// G·v of each query with the keys of its chunk up to its own, 0 else: a thread per (query, key).
#include "any.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_gains(const Piece p, const void *grad_o, const void *v, const u32 *lengths, float *gains) {
    i64 at;
    if (!element_of(at, (i64)p.batch * p.tokens * p.heads * GROUP * CHUNK)) return;
    Place r = place_of(p, at / CHUNK, GROUP), key = r;
    key.in_group = 0;
    key.token = r.token / CHUNK * CHUNK + at % CHUNK;
    float sum = 0.0f;
    if (key.token <= r.token && r.token < (int)lengths[r.b]) {
        i64 g = x_at(p, r, GROUP), x = y_at(p, key, 1);
        for (int c = 0; c < VALUE_DIM; c++) sum += load<GRAD_TYPE>(grad_o, g + c) * load<IN_TYPE>(v, x + c);
    }
    gains[at] = sum;
}
