// [α, 1]ᵀ[v, 1] over the keys of each span, and t of the keys for the kernels that follow: one block per (sequence, span,
// kv head).
#include "hash.cuh"

[[maybe_unused]] constexpr int SUMS_SHARED = 2 * ROWS * (HEAD_DIM + 8) * 2 + 2 * ROWS * (VALUE_DIM + 8) * 2 + Planes::bytes + Weights::bytes + ROWS * BITS * 4 + 1024;

extern "C" __global__ void __launch_bounds__(THREADS, 2) race_sums(const Walk p, const void *all_k, const void *all_v, const float *all_planes, const float2 *all_heads, const u32 *all_lengths, float *all_matrices, float *all_bits) {
    SHARED_BYTES;
    Carve carve = {shared_bytes};
    u16 *k_tiles = carve.take<u16>(2 * ROWS * (HEAD_DIM + 8) * 2);
    u16 *v_tiles = carve.take<u16>(2 * ROWS * (VALUE_DIM + 8) * 2);
    Planes planes = {carve.take<u16>(Planes::bytes)};
    Weights weights = {carve.take<u16>(Weights::bytes)};
    float *bits = carve.take<float>(ROWS * BITS * 4);

    int head = blockIdx.x % p.kv_heads, span = blockIdx.x / p.kv_heads % p.spans, b = blockIdx.x / (p.kv_heads * p.spans);
    int first = span * p.span;
    int count = (int)all_lengths[b] - first;
    count = count < 0 ? 0 : count > (int)p.span ? (int)p.span : count;
    const u16 *k = (const u16 *)all_k + b * p.k_batch + first * p.k_token + head * p.k_head;
    const u16 *v = (const u16 *)all_v + b * p.v_batch + first * p.v_token + head * p.v_head;
    float *bits_out = all_bits ? all_bits + bits_at(p, b, p.kv_heads, head, first) : nullptr;
    float beta = all_heads[head].x, centre = all_heads[head].y;
    int warp = warp_index();

    fetch<HEAD_DIM>(k_tiles, k, p.k_token, count);
    fetch<VALUE_DIM>(v_tiles, v, p.v_token, count);
    load_planes(planes, all_planes + head * p.planes_stride);
    clear_tile(weights);
    Carried<8> carried;
    carried.place(centre != 0.0f);
    float row = 0.0f;
    bool dirty = false;
    for (int tile = 0; tile * ROWS < count; tile++) {
        int left_over = count - tile * ROWS;
        copies_done();
        dirty |= clean<HEAD_DIM>(k_tiles + (tile & 1) * ROWS * (HEAD_DIM + 8));
        dirty |= clean<VALUE_DIM>(v_tiles + (tile & 1) * ROWS * (VALUE_DIM + 8));
        barrier();
        if (left_over > ROWS) {
            fetch<HEAD_DIM>(k_tiles + ((tile + 1) & 1) * ROWS * (HEAD_DIM + 8), k + (tile + 1) * ROWS * p.k_token, p.k_token, left_over - ROWS);
            fetch<VALUE_DIM>(v_tiles + ((tile + 1) & 1) * ROWS * (VALUE_DIM + 8), v + (tile + 1) * ROWS * p.v_token, p.v_token, left_over - ROWS);
        }
        Values values = {v_tiles + (tile & 1) * ROWS * (VALUE_DIM + 8)};
        if (warp < 4) {
            float t[BITS_UP / 8][4];
            project(t, k_tiles + (tile & 1) * ROWS * (HEAD_DIM + 8), planes, warp * 16);
            store_bits(bits, t, warp * 16);
            if (bits_out) store_bits(bits_out + tile * ROWS * BITS, t, warp * 16);
        } else if (!SPARE && centre != 0.0f) {
            for (int c = threadIdx.x - 128; c < VALUE_DIM; c += 128) {
                float sum = 0.0f;
                for (int r = 0; r < ROWS; r++) sum += input_at(values.at, VALUE_DIM + 8, r, c);
                row += sum;
            }
        }
        barrier();
        TileBits<THREADS> here;
        here.load(bits);
        here.store_keys(weights, beta, centre, left_over, true);
        barrier();
        carried.add(weights, values);
    }
    dirty = barrier_or(dirty);
    if (all_bits && threadIdx.x == 0) all_bits[marks_at(p, b, p.kv_heads, head, span)] = dirty ? 1.0f : 0.0f;
    float *matrix = all_matrices + ((i64)(b * p.kv_heads + head) * p.spans + span) * MATRIX;
    carried.write(matrix);
    if (SPARE && centre != 0.0f) return;
    if (threadIdx.x >= 128 && threadIdx.x < 128 + VALUE_DIM) matrix[BUCKETS * COLUMNS + threadIdx.x - 128] = row;
    if (threadIdx.x == 0) matrix[BUCKETS * COLUMNS + VALUE_DIM] = (float)count;
}
