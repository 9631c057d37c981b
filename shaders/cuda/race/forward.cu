// Outputs of the queries of each span, under the ratio: one block per (sequence, span, q head).
//
// o = (Ψ·M + tril(Ψ·αᵀ + c·S)·V + c·S·m) / D over the sums M before the tile, and the tile's own keys.
#include "hash.cuh"

[[maybe_unused]] constexpr int FORWARD_SHARED = KEY_BYTES + FORWARD_STAGES * VALUE_BYTES + Planes::bytes + 2 * Weights::bytes +
                               Entry::bytes + ROWS * BITS * 4 + BUCKETS_UP * 4 + VALUE_DIM * 4 + ROWS * 4 + 1024;

extern "C" __global__ void __launch_bounds__(THREADS, FORWARD_BLOCKS) race_forward(const Walk p, const void *all_q, const void *all_v, const float *all_planes, const float2 *all_heads, const u32 *all_lengths, const float *all_matrices, const float *all_bits, void *all_o) {
    SHARED_BYTES;
    Carve carve = {shared_bytes};
    Element *q_tile = carve.take<Element>(KEY_BYTES);
    Element *v_tiles = carve.take<Element>(FORWARD_STAGES * VALUE_BYTES);
    Planes planes = {carve.take<Element>(Planes::bytes)};
    Weights queries = {carve.take<Element>(Weights::bytes)};
    Weights keys = {carve.take<Element>(Weights::bytes)};
    Entry entry = {carve.take<Element>(Entry::bytes)};
    float *bits = carve.take<float>(ROWS * BITS * 4);
    float *masses = carve.take<float>(BUCKETS_UP * 4);
    float *means = carve.take<float>(VALUE_DIM * 4);
    float *divisors = carve.take<float>(ROWS * 4);

    Span at = span_of(p, p.q_heads, all_lengths);
    int b = at.b, q_head = at.head, head = q_head / GROUP, span = at.index, first = at.first, count = at.count, rows = at.rows;
    const Element *q = (const Element *)all_q + b * p.q_batch + first * p.q_token + q_head * p.q_head;
    const float *key_bits = all_bits + bits_at(p, b, p.kv_heads, head, first);
    const Element *v = (const Element *)all_v + b * p.v_batch + first * p.v_token + head * p.v_head;
    i64 o_token = (i64)p.q_heads * VALUE_DIM;
    i64 o_at = ((i64)b * p.tokens + first) * o_token + q_head * VALUE_DIM;
    float beta = all_heads[head].x, centre = all_heads[head].y;
    const float *matrix = all_matrices + matrix_at(p, b, p.kv_heads, head, span);
    bool dirty = all_bits[marks_at(p, b, p.kv_heads, head, span)] != 0.0f;
    int warp = warp_index(), lane = threadIdx.x & 31;
    int role = warp >> 2, row0 = (warp & 3) * 16;
    constexpr int HALF = VALUE_DIM / 2;

    fetch<HEAD_DIM>(q_tile, q, p.q_token, count);
    fetch<VALUE_DIM>(v_tiles, v, p.v_token, count);
    load_planes(planes, all_planes + head * p.planes_stride);
    clear_tile(queries);
    clear_tile(keys);
    Carried<8> carried;
    carried.place(centre != 0.0f);
    carried.read(matrix);
    float before = matrix[BUCKETS * COLUMNS + VALUE_DIM];
    if (threadIdx.x < VALUE_DIM) means[threadIdx.x] = centre != 0.0f ? matrix[BUCKETS * COLUMNS + threadIdx.x] : 0.0f;

    TileBits<128> tile_bits;
    if (role == 1) tile_bits.load(key_bits);
    for (int tile = 0; tile * ROWS < rows; tile++) {
        int here = count - tile * ROWS;
        copies_done();
        if (dirty) clean<VALUE_DIM>(v_tiles + tile % FORWARD_STAGES * VALUE_TILE);
        barrier();
        Values values = {v_tiles + tile % FORWARD_STAGES * VALUE_TILE};
        carried.show(entry, masses);
        if (SPARE && centre != 0.0f) carried.show_last(means, nullptr, 1.0f);
        if (role == 0) {
            // Each warp's own rows.
            float t[BITS_UP / 8][4];
            project(t, q_tile, planes, row0);
            store_bits(bits, t, row0);
            warp_barrier();
            store_rows(queries, bits, beta, centre, row0, here, one_of, false);
        } else {
            tile_bits.store_keys(keys, beta, centre, here, true);
        }
        barrier();
        if ((tile + 1) * ROWS < rows) {
            fetch<HEAD_DIM>(q_tile, q + (tile + 1) * ROWS * p.q_token, p.q_token, here - ROWS);
            if (FORWARD_STAGES > 1) fetch<VALUE_DIM>(v_tiles + (tile + 1) % FORWARD_STAGES * VALUE_TILE, v + (tile + 1) * ROWS * p.v_token, p.v_token, here - ROWS);
            prefetch_bits(key_bits + (tile + 1) * ROWS * BITS);
        }

        Kept<BUCKETS_UP, Weights> psi(queries, row0);
        // Ψ·αᵀ of the tile's own keys: all at once, so that sums do not wait for each other.
        float products[ROWS / 16][2][4];
#pragma unroll
        for (int o = 0; o < ROWS / 16; o++) clear(products[o]);
#pragma unroll WRITTEN_OUT
        for (int s = 0; s < BUCKETS_UP; s += 16) {
#pragma unroll
            for (int o = 0; o < ROWS / 16; o++) {
                if (o * 16 <= row0) multiply(products[o][0], products[o][1], psi.at(s), right(keys, row0 - o * 16, s));
            }
        }
        float divisor[2] = {0.0f, 0.0f};
        Left<TERMS> seen_products[ROWS / 16];
#pragma unroll
        for (int o = 0; o < ROWS / 16; o++) {
            if (o * 16 > row0) continue;
#pragma unroll
            for (int j = 0; j < 2; j++) {
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    int column = j * 8 + (lane & 3) * 2 + (i & 1), row = (lane >> 2) + (i >> 1) * 8;
                    if (o == 0 && column > row) products[o][j][i] = 0.0f;
                    divisor[i >> 1] += products[o][j][i];
                }
            }
            if (SUMS_IN_ONE && centre != 0.0f) {
#pragma unroll
                for (int j = 0; j < 2; j++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) {
                        if (o > 0 || j * 8 + (lane & 3) * 2 + (i & 1) <= (lane >> 2) + (i >> 1) * 8) products[o][j][i] += centre * BUCKETS;
                    }
                }
            }
            seen_products[o] = as_left<TERMS>(products[o][0], products[o][1]);
        }
        float o[HALF / 8][4];
        clear(o);
#pragma unroll WRITTEN_OUT
        for (int s = 0; s < BUCKETS_UP; s += 16) {
#pragma unroll
            for (int c = 0; c < HALF; c += 16) multiply(o[c / 8], o[c / 8 + 1], psi.at(s), right_turned(entry, s, role * HALF + c));
        }
        // Mass that the queries' weights find in the state, four lanes a row.
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int s = (lane & 3) * 2; s < BUCKETS_UP; s += 8) {
                float2 x = queries.get(row0 + (lane >> 2) + i * 8, s);
                divisor[i] += x.x * masses[s] + x.y * masses[s + 1];
            }
        }
#pragma unroll
        for (int back = 0; back < ROWS / 16; back++) {
            int other = row0 - back * 16;
            if (other < 0) continue;
            auto ones = seen(centre * BUCKETS, back == 0);
#pragma unroll
            for (int c = 0; c < HALF; c += 16) {
                auto x = right_turned(values, other, role * HALF + c);
                multiply(o[c / 8], o[c / 8 + 1], seen_products[back], x);
                if (!SUMS_IN_ONE && centre != 0.0f) multiply(o[c / 8], o[c / 8 + 1], ones, x);
            }
        }
        float inverse[2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = row0 + (lane >> 2) + i * 8;
            float d = row_sum(divisor[i]) + centre * BUCKETS * (before + (float)(tile * ROWS + row + 1));
            inverse[i] = d > 0.0f && row < here ? 1.0f / d : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < HALF / 8; j++) {
#pragma unroll
            for (int i = 0; i < 4; i++) {
                float mean = centre * BUCKETS * means[role * HALF + j * 8 + (lane & 3) * 2 + (i & 1)];
                o[j][i] = (o[j][i] + mean) * inverse[i >> 1];
            }
        }
#if OUT_TYPE == F32
        float *to = (float *)all_o + o_at + tile * ROWS * o_token;
#else
        u16 *to = (u16 *)all_o + o_at + tile * ROWS * o_token;
#endif
        store_tile<OUT_TYPE, HALF / 8>(to, o_token, o, row0, role * HALF, rows - tile * ROWS);
        // Past the last it is the last again: what is always loaded need not be kept.
        if (role == 1) tile_bits.load(key_bits + ((tile + 1) * ROWS < rows ? tile + 1 : tile) * ROWS * BITS);
        carried.add(keys, values);
        if (!SPARE && centre != 0.0f) {
            float sum = 0.0f;
            if (threadIdx.x < VALUE_DIM) {
                for (int r = 0; r < ROWS; r++) sum += input_at<VALUE_PITCH>(values.at, r, threadIdx.x);
            }
            barrier();
            if (threadIdx.x < VALUE_DIM) means[threadIdx.x] += sum;
        }
        if ((tile + 1) * ROWS < rows && FORWARD_STAGES == 1) {
            barrier();
            fetch<VALUE_DIM>(v_tiles, v + (tile + 1) * ROWS * p.v_token, p.v_token, here - ROWS);
        }
    }
}
