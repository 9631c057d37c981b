// Elements of the counter's tensors, as in counter.rs, bit for bit.
// Defined from outside: HEADS, CHANNELS, BF16 (0 or 1).

typedef unsigned int u32;
typedef unsigned long long u64;

#define GOLDEN 0x9e3779b9u

__device__ __forceinline__ u32 mix(u32 x) {
    x = (x ^ (x >> 16)) * 0x7feb352du;
    x = (x ^ (x >> 15)) * 0x846ca68bu;
    return x ^ (x >> 16);
}

// Of token `token`, counted on from one below `period`.
__device__ __forceinline__ u32 row_key(u32 base, u64 token, u32 period, u32 head) {
    while (token >= period) token -= period;
    return mix(mix(base ^ u32(token)) ^ (head * GOLDEN));
}

__device__ __forceinline__ float element(u32 key, u32 channel, float scale) {
    u32 sum = __dp4a(mix(key + channel * GOLDEN), 0x01010101u, 0u);
    // 2^23 + sum, bit by bit: a conversion without the slow instruction.
    return (__uint_as_float(0x4b000000u | sum) - 8388608.0f - 510.0f) * scale;
}

// Two elements as bf16, to nearest, ties to even.
__device__ __forceinline__ u32 two_bf16(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
