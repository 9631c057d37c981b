// The gates' gradients out of shares of each query head, `[sequence and tile, query head]`: one block per gate.
#include "window.cuh"

extern "C" __global__ void __launch_bounds__(256) window_gates(const Params p, const float *shares, float *out) {
    __shared__ double parts[256];
    double sum = 0.0;
    for (i64 i = threadIdx.x; i < (i64)p.tiles * Q_HEADS / p.gates; i += 256) sum += shares[i * p.gates + blockIdx.x];
    parts[threadIdx.x] = sum;
    barrier();
    for (int step = 128; step > 0; step >>= 1) {
        if ((int)threadIdx.x < step) parts[threadIdx.x] += parts[threadIdx.x + step];
        barrier();
    }
    if (threadIdx.x == 0) out[blockIdx.x] = (float)parts[0];
}
