// Backward in time order, under the ratio: dq, what each query leaves for the keys (1 / D and −G·o), what the queries of a
// span give to the gradient of the sums that they read, and shares of the gradients of hyperplanes and β. One block per
// (sequence, span, q head).
//
// With Z = tril(G·Vᵀ): values = G·Mᵀ + Z·α and masses = A + tril(1)·α give D = Ψ·masses, G·o = Ψ·values / D and
// dα = (values − G·o·masses) / D.
#include "hash.cuh"

extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS) race_backward_query(const Walk p, const void *all_q, const void *all_v, const void *all_grad_o, const float *all_planes, const float2 *all_heads, const u32 *all_lengths, const float *all_matrices, const float *all_bits, void *all_dq, float *all_of_queries, float2 *all_readings, float *all_query_bits, float *all_shares) {
    SHARED_BYTES;
    Carve carve = {shared_bytes};
    Element *q_tiles = carve.take<Element>(LATE_STAGES * KEY_BYTES);
    Element *v_tiles = carve.take<Element>(STAGES * VALUE_BYTES);
    Element *g_tiles = carve.take<Element>(STAGES * VALUE_BYTES);
    Planes planes = {carve.take<Element>(Planes::bytes)};
    FineWeights queries = {carve.take<Element>(FineWeights::bytes)};
    Weights keys = {carve.take<Element>(Weights::bytes)};
    Entry entry = {carve.take<Element>(Entry::bytes)};
    Corners corners = {carve.take<Element>(Corners::bytes)};
    HashGradient du = {carve.take<Element>(HashGradient::bytes)};
    float *bits = carve.take<float>(ROWS * BITS * 4);
    float *masses = carve.take<float>(BUCKETS_UP * 4);
    float *means = carve.take<float>(VALUE_DIM * 4);
    float *inverses = carve.take<float>(ROWS * 4);
    float *factors = carve.take<float>(ROWS * 4);
    float *room = carve.take<float>(4 * BITS_UP * 4);

    Span at = span_of(p, p.q_heads, all_lengths);
    int b = at.b, q_head = at.head, head = q_head / GROUP, span = at.index, first = at.first, count = at.count, rows = at.rows;
    const Element *q = (const Element *)all_q + b * p.q_batch + first * p.q_token + q_head * p.q_head;
    const float *key_bits = all_bits + bits_at(p, b, p.kv_heads, head, first);
    float *query_bits = all_query_bits + bits_at(p, b, p.q_heads, q_head, first);
    const Element *v = (const Element *)all_v + b * p.v_batch + first * p.v_token + head * p.v_head;
    const Element *g = (const Element *)all_grad_o + b * p.g_batch + first * p.g_token + q_head * p.g_head;
    i64 dq_token = (i64)p.q_heads * HEAD_DIM;
    Gradient *dq = (Gradient *)all_dq + ((i64)b * p.tokens + first) * dq_token + q_head * HEAD_DIM;
    float2 *readings = all_readings + ((i64)b * p.q_heads + q_head) * p.tokens + first;
    float beta = all_heads[head].x, centre = all_heads[head].y;
    const float *matrix = all_matrices + matrix_at(p, b, p.kv_heads, head, span);
    int warp = warp_index(), lane = threadIdx.x & 31;
    int row0 = (warp & 3) * 16;

    load_planes(planes, all_planes + head * p.planes_stride);
    load_corners(corners);
    clear_tile(queries);
    clear_tile(keys);
    clear_tile(du);
    Carried<8> of_queries;
    of_queries.place(false);
    float before = matrix[BUCKETS * COLUMNS + VALUE_DIM], sums_row = 0.0f;
    if (threadIdx.x < VALUE_DIM) means[threadIdx.x] = centre != 0.0f ? matrix[BUCKETS * COLUMNS + threadIdx.x] : 0.0f;

    auto q_at = [&](int tile) { return q_tiles + tile % LATE_STAGES * KEY_TILE; };
    auto v_at = [&](int tile) { return v_tiles + tile % STAGES * VALUE_TILE; };
    auto g_at = [&](int tile) { return g_tiles + tile % STAGES * VALUE_TILE; };
    auto fetch_queries = [&](int tile) { fetch<HEAD_DIM, CARRYING>(q_at(tile), q + (i64)tile * ROWS * p.q_token, p.q_token, count - tile * ROWS); };
    auto fetch_values = [&](int tile) { fetch<VALUE_DIM, CARRYING>(v_at(tile), v + (i64)tile * ROWS * p.v_token, p.v_token, count - tile * ROWS); };
    auto fetch_gradients = [&](int tile) { fetch<VALUE_DIM, CARRYING>(g_at(tile), g + (i64)tile * ROWS * p.g_token, p.g_token, count - tile * ROWS); };
    // The queries of a tile are hashed while the sums of the one before are carried on, where there is room for both.
    constexpr bool AHEAD = LATE_STAGES > 1;
    if (warp < CARRIERS) {
        fetch_queries(0);
        fetch_values(0);
        fetch_gradients(0);
        copies_done();
    }
    auto finish = [&](int tile) { store_hash_inputs(dq + tile * ROWS * dq_token, dq_token, du, planes, row0, rows - tile * ROWS, warp >> 2); };

    bool dirty = false;
    barrier();
    if (warp < CARRIERS) {
        // Of keys and values.
        bool dirty_keys = all_bits[marks_at(p, b, p.kv_heads, head, span)] != 0.0f;
        TileBits<CARRYING> tile_bits;
        tile_bits.load(key_bits);
        Carried<CARRIERS> carried;
        carried.place(centre != 0.0f);
        carried.read(matrix);
        PlaneSums plane_sums;
        plane_sums.place(warp);
        for (int tile = 0; tile * ROWS < rows; tile++) {
            carried.show(entry, masses);
            if (SPARE && centre != 0.0f) carried.show_last(entry);
            tile_bits.store_keys(keys, beta, centre, count - tile * ROWS, true);
            copies_done();
            if (dirty_keys) clean<VALUE_DIM, ROWS, CARRYING>(v_at(tile));
            barrier();
            bool more = (tile + 1) * ROWS < rows;
            if (more && LATE_STAGES > 1) fetch_queries(tile + 1);
            if (more && STAGES > 1) {
                fetch_values(tile + 1);
                fetch_gradients(tile + 1);
            }
            // Past the last it is the last again: what is always loaded need not be kept.
            tile_bits.load(key_bits + (more ? tile + 1 : tile) * ROWS * BITS);
            carried.add(keys, Values{v_at(tile)});
            float of_mean = 0.0f;
            if (!SPARE && centre != 0.0f && threadIdx.x < VALUE_DIM) {
                for (int r = 0; r < ROWS; r++) of_mean += input_at<VALUE_PITCH>(v_at(tile), r, threadIdx.x);
            }
            if (AHEAD) copies_done();
            barrier();
            // Nothing reads v of the tile any more.
            if (more && STAGES == 1) fetch_values(tile + 1);
            if (!SPARE && centre != 0.0f && threadIdx.x < VALUE_DIM) {
                means[threadIdx.x] += of_mean;
                for (int r = 0; r < ROWS; r++) sums_row += inverses[r] * input_at<VALUE_PITCH>(g_at(tile), r, threadIdx.x);
            }
            plane_sums.add(du, Keys{q_at(tile)});
            of_queries.add_scaled(queries, Values{g_at(tile)}, factors);
            barrier();
            if (more && LATE_STAGES == 1) fetch_queries(tile + 1);
            if (more && STAGES == 1) fetch_gradients(tile + 1);
            finish(tile);
        }
        plane_sums.write(all_shares + (i64)blockIdx.x * BITS * (HEAD_DIM + 1));
    } else {
        float of_beta[BITS_UP / 8][2];
#pragma unroll
        for (int j = 0; j < BITS_UP / 8; j++) of_beta[j][0] = of_beta[j][1] = 0.0f;
        float t[BITS_UP / 8][4];
        // Of each warp's own rows.
        auto hash_queries = [&](int tile) {
            project(t, q_at(tile), planes, row0);
            store_bits(bits, t, row0);
            store_bits(query_bits + tile * ROWS * BITS, t, row0);
            warp_barrier();
            store_rows(queries, bits, beta, centre, row0, count - tile * ROWS, one_of, false);
        };
        if (AHEAD && rows > 0) hash_queries(0);
        for (int tile = 0; tile * ROWS < rows; tile++) {
            int here = count - tile * ROWS;
            barrier();
            if (!AHEAD) hash_queries(tile);
            warp_barrier();
            {
                Values values = {v_at(tile)}, gradients = {g_at(tile)};
                float value[BUCKETS_UP / 8][4], products[ROWS / 16][2][4];
                float gain[2];
#pragma unroll 1
                for (int turn = 0; turn < 2; turn++) {
                    gain[0] = gain[1] = 0.0f;
                    clear(value);
#pragma unroll
                    for (int o = 0; o < ROWS / 16; o++) clear(products[o]);
                    // Sixteen of the values at a time, from the row's own back: all at once, so that sums do not wait for each other.
#pragma unroll WRITTEN_OUT
                    for (int c = 0; c < VALUE_DIM; c += 16) {
                        auto grad = left(gradients, row0, c);
#pragma unroll
                        for (int s = 0; s < BUCKETS_UP; s += 16) multiply(value[s / 8], value[s / 8 + 1], grad, right(entry, s, c));
#pragma unroll
                        for (int o = 0; o < ROWS / 16; o++) {
                            if (o * 16 <= row0) multiply(products[o][0], products[o][1], grad, right(values, row0 - o * 16, c));
                        }
                        if (!SPARE && centre != 0.0f) add_gains(gain, grad, means + c);
                    }
                    if (!not_finite_sums(value[0])) break;
                    dirty = true;
                    if (turn == 0) clean_sixteen<VALUE_DIM>(g_at(tile), row0);
                }
                if (SPARE && (lane & 3) == BUCKETS % 8 / 2) {
                    // G·Σv is the product with the last row and what its parts leave.
#pragma unroll
                    for (int i = 0; i < 2; i++) gain[i] = value[BUCKETS / 8][2 * i] + value[BUCKETS / 8][2 * i + 1];
                }
                // In two parts: the gradient of A is a sum of what they make, with either sign.
                Left<PLANE_TERMS> z[ROWS / 16];
#pragma unroll
                for (int o = 0; o < ROWS / 16; o++) {
                    if (o * 16 > row0) continue;
#pragma unroll
                    for (int j = 0; j < 2; j++) {
#pragma unroll
                        for (int i = 0; i < 4; i++) {
                            int column = j * 8 + (lane & 3) * 2 + (i & 1), row = (lane >> 2) + (i >> 1) * 8;
                            if (o == 0 && column > row) products[o][j][i] = 0.0f;
                            gain[i >> 1] += products[o][j][i];
                        }
                    }
                    z[o] = as_left<PLANE_TERMS>(products[o][0], products[o][1]);
                }
                float mass[BUCKETS_UP / 8][4];
#pragma unroll
                for (int j = 0; j < BUCKETS_UP / 8; j++) {
#pragma unroll
                    for (int i = 0; i < 4; i++) mass[j][i] = masses[j * 8 + (lane & 3) * 2 + (i & 1)];
                }
#pragma unroll
                for (int o = 0; o < ROWS / 16; o++) {
                    if (o * 16 > row0) continue;
                    auto ones = seen(1.0f, o == 0);
#pragma unroll
                    for (int s = 0; s < BUCKETS_UP; s += 16) {
                        auto x = right_turned(keys, row0 - o * 16, s);
                        multiply(value[s / 8], value[s / 8 + 1], z[o], x);
                        multiply(mass[s / 8], mass[s / 8 + 1], ones, x);
                    }
                }
                warp_barrier();
                float divisor[2] = {0.0f, 0.0f}, output[2] = {0.0f, 0.0f};
#pragma unroll
                for (int j = 0; j < BUCKETS_UP / 8; j++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float2 x = queries.get(row0 + (lane >> 2) + i * 8, j * 8 + (lane & 3) * 2);
                        divisor[i] += x.x * mass[j][2 * i] + x.y * mass[j][2 * i + 1];
                        output[i] += x.x * value[j][2 * i] + x.y * value[j][2 * i + 1];
                    }
                }
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    divisor[i] = row_sum(divisor[i]);
                    output[i] = row_sum(output[i]);
                }
                float inverse[2], reading[2];
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    int row = row0 + (lane >> 2) + i * 8;
                    float all = centre * BUCKETS;
                    float d = divisor[i] + all * (before + (float)(tile * ROWS + row + 1));
                    float n = output[i] + all * row_sum(gain[i]);
                    inverse[i] = d > 0.0f && row < here ? 1.0f / d : 0.0f;
                    reading[i] = -n * inverse[i];
                    if ((lane & 3) == 0) {
                        inverses[row] = inverse[i];
                        factors[row] = reading[i];
                        if (tile * ROWS + row < rows) readings[tile * ROWS + row] = make_pair(inverse[i], reading[i]);
                    }
                }
#pragma unroll
                for (int j = 0; j < BUCKETS_UP / 8; j++) {
#pragma unroll
                    for (int i = 0; i < 2; i++) {
                        float2 x = queries.get(row0 + (lane >> 2) + i * 8, j * 8 + (lane & 3) * 2);
                        value[j][2 * i] = inverse[i] * (value[j][2 * i] + reading[i] * mass[j][2 * i]) * (x.x + centre);
                        value[j][2 * i + 1] = inverse[i] * (value[j][2 * i + 1] + reading[i] * mass[j][2 * i + 1]) * (x.y + centre);
                    }
                }
                through_hash(value, t, corners, du, of_beta, row0, beta);
                // Over D from here on, rounded but once.
                warp_barrier();
                store_rows(queries, bits, beta, centre, row0, here, [&](int row) { return inverses[row]; }, true);
            }
            barrier();
            if (!SPARE && centre != 0.0f && threadIdx.x == THREADS - 1) {
                for (int r = 0; r < ROWS; r++) sums_row += inverses[r] * factors[r];
            }
            of_queries.add_scaled(queries, Values{g_at(tile)}, factors);
            barrier();
            finish(tile);
            if (AHEAD && (tile + 1) * ROWS < rows) hash_queries(tile + 1);
        }
        keep_of_beta(room, of_beta, warp - CARRIERS);
    }
    dirty = barrier_or(dirty);
    if (threadIdx.x == 0) all_query_bits[marks_at(p, b, p.q_heads, q_head, span)] = dirty ? 1.0f : 0.0f;
    float *out = all_of_queries + matrix_at(p, b, p.q_heads, q_head, span);
    of_queries.write(out);
    float *last = out + BUCKETS * COLUMNS;
    if (SPARE && centre != 0.0f) {
        of_queries.show_last(last, last + VALUE_DIM, centre * BUCKETS);
    } else {
        if (threadIdx.x < VALUE_DIM) last[threadIdx.x] = centre * BUCKETS * sums_row;
        if (threadIdx.x == THREADS - 1) last[VALUE_DIM] = centre * BUCKETS * sums_row;
    }
    write_of_beta(all_shares + (i64)blockIdx.x * BITS * (HEAD_DIM + 1), room);
}
