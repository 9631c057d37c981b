// The twin of hash_keys.cu for 16-bit keys, on the matrix unit: one block per (128 tokens, kv head, item), 16 tokens per
// warp. Hyperplanes come as the three bf16 parts of their f32, keys as one part, or as two where they are f16 or less a
// mean: sums are as exact as those of f32 products.
#include "scoring.cuh"

#define THREADS 256
#define WARPS (THREADS / 32)
#define TOKENS (WARPS * 16)
#define X_SPLITS (KV_DTYPE == DTYPE_BF16 && !CENTER ? 1 : 2)
#define W_SPLITS 3
#define CHUNK 32
#define CHUNKS ((BITS + CHUNK - 1) / CHUNK)
#define K_STEPS ((HEAD_DIM + 15) / 16)
// Bytes of a plane in global and in shared memory.
#define PLANE_BYTES (K_STEPS * 32)
#define PLANE_ROW (PLANE_BYTES + 16)
#define STAGE (W_SPLITS * CHUNK * PLANE_ROW)

extern __shared__ __align__(16) u8 memory[];

__device__ __forceinline__ void copy_chunk(const Call& p, u32 stage, u32 set, u32 chunk) {
    const u32 pieces = PLANE_BYTES / 16;
    for (u32 at = threadIdx.x; at < W_SPLITS * CHUNK * pieces; at += THREADS) {
        u32 split = at / (CHUNK * pieces), plane = at / pieces % CHUNK, piece = at % pieces;
        u64 from = (u64)p.plane_parts + (((u64)set * W_SPLITS + split) * (CHUNKS * CHUNK) + chunk * CHUNK + plane) * PLANE_BYTES + piece * 16;
        copy_piece(stage + (split * CHUNK + plane) * PLANE_ROW + piece * 16, from, true);
    }
}

__device__ __forceinline__ float rest_of(float x) { return x - widen<DTYPE_BF16>(narrow<DTYPE_BF16>(x)); }
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(FULL_WARP, x, 1);
    return x + __shfl_xor_sync(FULL_WARP, x, 2);
}

extern "C" __global__ void __launch_bounds__(THREADS) hash_tiles(ARGUMENTS) {
    CALL;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 of_row = lane / 4, pair = lane % 4 * 2;
    Item item = p.items[blockIdx.z];
    u32 head = blockIdx.y;
    u32 first = item.hash_start / 64 * 64 + blockIdx.x * TOKENS;
    wait_for_earlier();
    if (first >= item.hash_end) return;
    u32 set = p.planes_stride > 0 ? head : 0;
    u32 shared = shared_address(memory);
    copy_chunk(p, shared, set, 0);
    copies_commit();

    // A tile of 16 tokens lies in one page; tokens past the last are read as the last.
    u32 tokens[2];
    u64 rows[2], page = 0;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        tokens[r] = first + warp * 16 + of_row + 8 * r;
        u32 safe = min_u32(tokens[r], item.hash_end - 1);
        page = page_of(p, item.sequence, safe);
        rows[r] = key_row(page, head, safe);
    }
    u32 keys[X_SPLITS][K_STEPS][4];
    float squares[2] = {0.0f, 0.0f}, magnitudes[2] = {0.0f, 0.0f};
#pragma unroll
    for (u32 step = 0; step < K_STEPS; step++)
#pragma unroll
        for (u32 i = 0; i < 4; i++) {
            u32 channel = step * 16 + i / 2 * 8 + pair, r = i % 2;
            u32 words = channel < K_PIECES * PIECE ? *(const u32*)(rows[r] + channel * 2) : 0;
            float x = widen<KV_DTYPE>(words & 0xffffu), y = widen<KV_DTYPE>(words >> 16);
#if CENTER
            const u32* mean = p.state + (u64)item.slot * SLOT_WORDS + head * HEAD_DIM;
            if (channel < HEAD_DIM) x -= bits_float(mean[channel]);
            if (channel + 1 < HEAD_DIM) y -= bits_float(mean[channel + 1]);
#endif
            squares[r] += x * x + y * y;
#pragma unroll
            for (u32 split = 0; split < X_SPLITS; split++) {
                keys[split][step][i] = pack_pair<DTYPE_BF16>(x, y);
                x = rest_of(x);
                y = rest_of(y);
            }
        }
#if PLANES != 8
    u32* words = (u32*)(memory + 2 * STAGE);
    for (u32 i = threadIdx.x; i < WORDS * TOKENS; i += THREADS) words[i] = 0;
#endif
    for (u32 chunk = 0; chunk < CHUNKS; chunk++) {
        copies_wait<0>();
        __syncthreads();
        if (chunk + 1 < CHUNKS) copy_chunk(p, shared + (chunk + 1) % 2 * STAGE, set, chunk + 1);
        copies_commit();
        u32 stage = shared + chunk % 2 * STAGE;
#if PLANES == 8
        u32 word[2] = {0, 0};
#endif
#pragma unroll
        for (u32 n = 0; n < CHUNK / 16; n++) {
            float u[2][4] = {};
            u32 at = stage + (n * 16 + lane % 8 + lane / 16 * 8) * PLANE_ROW + lane / 8 % 2 * 16;
#pragma unroll
            for (u32 step = 0; step < K_STEPS; step++)
#pragma unroll
                for (u32 split = 0; split < W_SPLITS; split++) {
                    u32 b[4];
                    load_matrices(b, at + split * (CHUNK * PLANE_ROW) + step * 32);
#pragma unroll
                    for (u32 x = 0; x < X_SPLITS; x++)
                        // The least parts of both do not count.
                        if (x + split < W_SPLITS) {
                            mma16<DTYPE_BF16>(u[0], keys[x][step], b[0], b[1]);
                            mma16<DTYPE_BF16>(u[1], keys[x][step], b[2], b[3]);
                        }
                }
#pragma unroll
            for (u32 half = 0; half < 2; half++)
#pragma unroll
                for (u32 c = 0; c < 4; c++) {
                    u32 plane = chunk * CHUNK + n * 16 + half * 8 + pair + c % 2;
                    if (plane >= BITS) continue;
                    float value = u[half][c];
                    magnitudes[c / 2] += fabsf(value);
#if PLANES == 8
                    if (value >= 0.0f) word[c / 2] |= 1u << ((n * 2 + half) * 8 + 7 - pair - c % 2);
#else
                    u32 table = plane / PLANES;
                    u32 bit = table % TABLES_PER_WORD * PLANES + PLANES - 1 - plane % PLANES;
                    if (value >= 0.0f) atomicOr(&words[table / TABLES_PER_WORD * TOKENS + warp * 16 + of_row + c / 2 * 8], 1u << bit);
#endif
                }
        }
#if PLANES == 8
#pragma unroll
        for (u32 r = 0; r < 2; r++) {
            word[r] |= __shfl_xor_sync(FULL_WARP, word[r], 1);
            word[r] |= __shfl_xor_sync(FULL_WARP, word[r], 2);
            if (lane % 4 == r && tokens[r] >= item.hash_start && tokens[r] < item.hash_end)
                *index_word(page, head, chunk, tokens[r]) = word[r];
        }
#endif
    }
#if PLANES != 8
    __syncthreads();
    for (u32 i = threadIdx.x; i < WORDS * TOKENS; i += THREADS) {
        u32 token = first + i % TOKENS;
        if (token >= item.hash_start && token < item.hash_end)
            *index_word(page_of(p, item.sequence, token), head, i / TOKENS, token) = words[i];
    }
#endif
#if GAIN
    float value_norms[2] = {0.0f, 0.0f};
#if VALUE_NORM
    for (u32 i = 0; i < 16; i++) {
        u32 token = min_u32(first + warp * 16 + i, item.hash_end - 1);
        u64 row = value_row(page_of(p, item.sequence, token), head, token);
        float square = 0.0f;
        for (u32 piece = lane; piece < V_PIECES; piece += 32) {
            uint4 loaded = *(const uint4*)(row + piece * 16);
            u32 parts[4] = {loaded.x, loaded.y, loaded.z, loaded.w};
#pragma unroll
            for (u32 c = 0; c < 4; c++) {
                float x = widen<KV_DTYPE>(parts[c] & 0xffffu), y = widen<KV_DTYPE>(parts[c] >> 16);
                square += x * x + y * y;
            }
        }
        square = warp_sum(square);
        if (i % 8 == of_row) value_norms[i / 8] = sqrtf(square);
    }
#endif
    float largest = 0.0f;
#pragma unroll
    for (u32 r = 0; r < 2; r++) {
        float square = quad_sum(squares[r]), magnitude = quad_sum(magnitudes[r]);
        if (lane % 4 == 0 && tokens[r] >= item.hash_start && tokens[r] < item.hash_end) {
            float gain = key_gain(value_norms[r], square, magnitude);
            largest = fmaxf(largest, gain);
            *index_word(page, head, WORDS, tokens[r]) = float_bits(gain);
#if BIAS
            *index_word(page, head, WORDS + 1, tokens[r]) = float_bits(key_bias(value_norms[r]));
#endif
        }
    }
    for (u32 step = 16; step > 0; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
    if (lane == 0) atomicMax(&p.state[(u64)item.slot * SLOT_WORDS + MEAN_WORDS + head], float_bits(largest));
#endif
}
