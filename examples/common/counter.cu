// Fills a tensor, follows counter.cuh. WIDTH: channels of a thread, which divide CHANNELS.

struct alignas(WIDTH * (BF16 ? 2 : 4) < 16 ? WIDTH * (BF16 ? 2 : 4) : 16) Group {
#if BF16
    unsigned short x[WIDTH];
#else
    float x[WIDTH];
#endif
};

extern "C" __global__ void fill(u32 base, u32 first, u32 period, float scale, u32 rows, Group* out) {
    const u32 groups = CHANNELS / WIDTH;
    u32 at = blockIdx.x * blockDim.x + threadIdx.x;
    u32 row = at / groups, channel = at % groups * WIDTH;
    if (row >= rows) return;
    u32 key = row_key(base, u64(first) + row / HEADS, period, row % HEADS);
    Group group;
#pragma unroll
    for (u32 i = 0; i < WIDTH; ++i) {
        float x = element(key, channel + i, scale);
#if BF16
        group.x[i] = (unsigned short)two_bf16(x, 0.0f);
#else
        group.x[i] = x;
#endif
    }
    out[at] = group;
}
