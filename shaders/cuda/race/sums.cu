// [α, 1]ᵀ[v, 1] over the keys of each span, and t of the keys for the kernels that follow: one block per (sequence, span,
// kv head).
#include "hash.cuh"

// Tiles that a block keeps of k and of v: of f32 two blocks have room for one, and work while the other waits.
constexpr int SUMS_STAGES = sizeof(Element) == 2 ? 2 : 1;
[[maybe_unused]] constexpr int SUMS_SHARED = SUMS_STAGES * (KEY_BYTES + VALUE_BYTES) + Planes::bytes + Weights::bytes + ROWS * BITS * 4 + 1024;

extern "C" __global__ void __launch_bounds__(THREADS, 2) race_sums(const Walk p, const void *all_k, const void *all_v, const float *all_planes, const float2 *all_heads, const u32 *all_lengths, float *all_matrices, float *all_bits) {
    SHARED_BYTES;
    Carve carve = {shared_bytes};
    Element *k_tiles = carve.take<Element>(SUMS_STAGES * KEY_BYTES);
    Element *v_tiles = carve.take<Element>(SUMS_STAGES * VALUE_BYTES);
    Planes planes = {carve.take<Element>(Planes::bytes)};
    Weights weights = {carve.take<Element>(Weights::bytes)};
    float *bits = carve.take<float>(ROWS * BITS * 4);

    Span at = span_of(p, p.kv_heads, all_lengths);
    int b = at.b, head = at.head, span = at.index, first = at.first, count = at.count;
    const Element *k = (const Element *)all_k + b * p.k_batch + first * p.k_token + head * p.k_head;
    const Element *v = (const Element *)all_v + b * p.v_batch + first * p.v_token + head * p.v_head;
    float *bits_out = all_bits ? all_bits + bits_at(p, b, p.kv_heads, head, first) : nullptr;
    float beta = all_heads[head].x, centre = all_heads[head].y;
    int warp = warp_index();

    auto k_at = [&](int tile) { return k_tiles + tile % SUMS_STAGES * KEY_TILE; };
    auto v_at = [&](int tile) { return v_tiles + tile % SUMS_STAGES * VALUE_TILE; };
    auto fetch_keys = [&](int tile) { fetch<HEAD_DIM>(k_at(tile), k + tile * ROWS * p.k_token, p.k_token, count - tile * ROWS); };
    auto fetch_values = [&](int tile) { fetch<VALUE_DIM>(v_at(tile), v + tile * ROWS * p.v_token, p.v_token, count - tile * ROWS); };
    fetch_keys(0);
    fetch_values(0);
    load_planes(planes, all_planes + head * p.planes_stride);
    clear_tile(weights);
    Carried<8> carried;
    carried.place(centre != 0.0f);
    float row = 0.0f;
    bool dirty = false;
    for (int tile = 0; tile * ROWS < count; tile++) {
        int left_over = count - tile * ROWS;
        copies_done();
        dirty |= clean<HEAD_DIM>(k_at(tile));
        dirty |= clean<VALUE_DIM>(v_at(tile));
        barrier();
        bool more = left_over > ROWS;
        if (SUMS_STAGES > 1 && more) {
            fetch_keys(tile + 1);
            fetch_values(tile + 1);
        }
        Values values = {v_at(tile)};
        if (warp < 4) {
            float t[BITS_UP / 8][4];
            project(t, k_at(tile), planes, warp * 16);
            store_bits(bits, t, warp * 16);
            if (bits_out) store_bits(bits_out + tile * ROWS * BITS, t, warp * 16);
        } else if (!SPARE && centre != 0.0f) {
            for (int c = threadIdx.x - 128; c < VALUE_DIM; c += 128) {
                float sum = 0.0f;
                for (int r = 0; r < ROWS; r++) sum += input_at<VALUE_PITCH>(values.at, r, c);
                row += sum;
            }
        }
        barrier();
        if (SUMS_STAGES == 1 && more) fetch_keys(tile + 1);
        TileBits<THREADS> here;
        here.load(bits);
        here.store_keys(weights, beta, centre, left_over, true);
        barrier();
        carried.add(weights, values);
        if (SUMS_STAGES == 1 && more) {
            barrier();
            fetch_values(tile + 1);
        }
    }
    dirty = barrier_or(dirty);
    if (all_bits && threadIdx.x == 0) all_bits[marks_at(p, b, p.kv_heads, head, span)] = dirty ? 1.0f : 0.0f;
    float *matrix = all_matrices + matrix_at(p, b, p.kv_heads, head, span);
    carried.write(matrix);
    if (SPARE && centre != 0.0f) return;
    if (threadIdx.x >= 128 && threadIdx.x < 128 + VALUE_DIM) matrix[BUCKETS * COLUMNS + threadIdx.x - 128] = row;
    if (threadIdx.x == 0) matrix[BUCKETS * COLUMNS + VALUE_DIM] = (float)count;
}
