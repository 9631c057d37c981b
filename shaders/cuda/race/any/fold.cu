// Adds the tokens that wait to a state's sums: one block per (sequence, kv head).
#include "pending.cuh"

extern "C" __global__ void __launch_bounds__(BLOCK) any_fold(float *state, float *records) {
    __shared__ float2 odds[PENDING * BITS];
    __shared__ __align__(16) float phis[FOLD * PENDING];
    float *record = records + (i64)blockIdx.x * RECORD;
    int count = (int)bits_of(record[0]);
    if (count == 0) return;
    for (int ensemble = 0; ensemble < ENSEMBLES; ensemble++) {
        float *of_ensemble = state + ((i64)blockIdx.x * ENSEMBLES + ensemble) * STATE_UNIT;
        barrier();
        for (int i = threadIdx.x; i < count * BITS; i += BLOCK) odds[i] = odds_of(waiting(record, i / BITS)[ensemble * BITS + i % BITS]);
        barrier();
        for (int first = 0; first < VALUE_DIM; first += CHANNELS) {
            int channel = first + threadIdx.x % CHANNELS;
            float values[PENDING];
            for (int i = 0; i < PENDING; i++) values[i] = i < count && channel < VALUE_DIM ? waiting(record, i)[ENSEMBLES * BITS + channel] : 0.0f;
            fold(of_ensemble, odds, phis, values, count, channel, first == 0);
        }
    }
    barrier();
    if (threadIdx.x == 0) record[0] = float_of(0);
}
