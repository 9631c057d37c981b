// Adds shares of the gradients of hyperplanes and β, `[sequence and span, head, bits, head_dim + 1]`, to sums in doubles
// `[set, bits, head_dim + 1]`: one block per 32 elements of a set, eight threads each.
#include "machine.cuh"

struct Shares {
    // Parts of a head; heads of the shares, and of them in a set; elements of a share, and from one set's to the next's.
    u32 parts, heads, heads_of_set, elements;
    i64 set_step;
};

extern "C" __global__ void __launch_bounds__(256) race_add_parameters(const Shares p, const float *shares, double *totals) {
    __shared__ double parts[256];
    u32 blocks = (p.elements + 31) / 32;
    u32 set = blockIdx.x / blocks, element = blockIdx.x % blocks * 32 + threadIdx.x % 32;
    double sum = 0.0;
    if (element < p.elements) {
        for (u32 i = threadIdx.x / 32; i < p.parts * p.heads_of_set; i += 8) {
            u32 part = i / p.heads_of_set, head = set * p.heads_of_set + i % p.heads_of_set;
            sum += shares[((i64)part * p.heads + head) * p.elements + element];
        }
    }
    parts[threadIdx.x] = sum;
    barrier();
    if (threadIdx.x < 32 && element < p.elements) {
        for (int i = 1; i < 8; i++) sum += parts[threadIdx.x + 32 * i];
        totals[set * p.set_step + element] += sum;
    }
}
