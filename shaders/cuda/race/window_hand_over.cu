// What the gradient of the ring after a call holds for the call's own tokens goes to their dk and dv, one element for each
// thread; what is left is of the tokens before.
#include "window.cuh"

extern "C" __global__ void __launch_bounds__(256) window_hand_over(const Params p, const u32 *far, const u64 *seen, float *ring_grads, float *dk, float *dv) {
    i64 at = (i64)blockIdx.x * 256 + threadIdx.x;
    u32 count = p.window < p.tokens ? p.window : p.tokens;
    int channel = at % (HEAD_DIM + VALUE_DIM), head = at / (HEAD_DIM + VALUE_DIM) % KV_HEADS;
    i64 row = at / (HEAD_DIM + VALUE_DIM) / KV_HEADS;
    int b = row / count;
    if (b >= (int)p.batch) return;
    Sequence s = sequence_of(p, far, seen, b);
    u32 token = (s.length > p.window ? s.length - p.window : 0) + row % count;
    if (token >= s.length) return;
    float *from = ring_grads + ring_row(p, s, b, token, head) + channel;
    i64 to = ((i64)b * p.tokens + token) * KV_HEADS + head;
    if (channel < HEAD_DIM) dk[to * HEAD_DIM + channel] += *from;
    else dv[to * VALUE_DIM + channel - HEAD_DIM] += *from;
    *from = 0.0f;
}
