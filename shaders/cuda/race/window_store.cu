// The last keys and values of a call into their slots of the ring, one element for each thread.
#include "window.cuh"

extern "C" __global__ void __launch_bounds__(256) window_store(const Params p, const u32 *far, const u64 *seen, const void *k, const void *v, void *ring) {
    i64 at = (i64)blockIdx.x * 256 + threadIdx.x;
    u32 count = p.window < p.tokens ? p.window : p.tokens;
    int channel = at % (HEAD_DIM + VALUE_DIM), head = at / (HEAD_DIM + VALUE_DIM) % KV_HEADS;
    i64 row = at / (HEAD_DIM + VALUE_DIM) / KV_HEADS;
    int b = row / count;
    if (b >= (int)p.batch) return;
    Sequence s = sequence_of(p, far, seen, b);
    u32 token = (s.length > p.window ? s.length - p.window : 0) + row % count;
    if (token >= s.length) return;
    float x = channel < HEAD_DIM ? load<IN_TYPE>(k, b * p.k_batch + token * p.k_token + head * p.k_head + channel)
                                 : load<IN_TYPE>(v, b * p.v_batch + token * p.v_token + head * p.v_head + channel - HEAD_DIM);
    // Exact: in the dtype that it came in.
    store<IN_TYPE>(ring, ring_row(p, s, b, token, head) + channel, x);
}
