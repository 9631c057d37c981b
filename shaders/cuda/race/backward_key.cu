// Backward against the order of time, under the ratio: dk and dv from the gradient of the sums after each tile and the
// tile's own later queries, of all heads of the group; shares of the gradients of hyperplanes and β. One block per
// (sequence, span, kv head).
#include "hash.cuh"

// Channels of dv at a time: fewer registers or instructions, where nothing is kept from one head of the group to the next.
constexpr int WIDTH = GROUP == 1 && VALUE_DIM > 64 && (BACKWARD_BLOCKS > 1 || WRITTEN_OUT == 1) ? 64 : VALUE_DIM;

// Products of sixteen rows at a time.
constexpr int AT_ONCE = BACKWARD_BLOCKS > 1 ? 2 : 4;

// Adds what each key of a tile's sixteen weighs with all buckets alike, over D of sixteen queries that see it.
__device__ __forceinline__ void add_of_all(float (&to)[2][4], int tiles_apart, const float *inverses, float all) {
    int lane = threadIdx.x & 31;
#pragma unroll
    for (int j = 0; j < 2; j++) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int column = j * 8 + (lane & 3) * 2 + (i & 1), row = (lane >> 2) + (i >> 1) * 8;
            if (tiles_apart > 0 || column >= row) to[j][i] += all * inverses[column];
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BACKWARD_BLOCKS) race_backward_key(const Walk p, const void *all_k, const void *all_v, const void *all_grad_o, const float *all_planes, const float2 *all_heads, const u32 *all_lengths, const float *all_after, const float2 *all_readings, const float *all_query_bits, const float *all_bits, void *all_dk, void *all_dv, float *all_shares) {
    SHARED_BYTES;
    Carve carve = {shared_bytes};
    Element *k_tile = carve.take<Element>(KEY_BYTES);
    Element *v_tiles = carve.take<Element>(STAGES * VALUE_BYTES);
    Element *g_tiles = carve.take<Element>(STAGES * VALUE_BYTES);
    Planes planes = {carve.take<Element>(Planes::bytes)};
    // Of queries over their D.
    Weights queries = {carve.take<Element>(Weights::bytes)};
    FineWeights keys = {carve.take<Element>(FineWeights::bytes)};
    Entry entry = {carve.take<Element>(Entry::bytes)};
    Corners corners = {carve.take<Element>(Corners::bytes)};
    HashGradient du = {carve.take<Element>(HashGradient::bytes)};
    float *masses = carve.take<float>(BUCKETS_UP * 4);
    float *later = carve.take<float>(VALUE_DIM * 4);
    float *inverses = carve.take<float>(ROWS * 4);
    float *factors = carve.take<float>(ROWS * 4);
    float *room = carve.take<float>(4 * BITS_UP * 4);
    StagedBits of_keys = {carve.take<float>(StagedBits::bytes)}, of_queries = {carve.take<float>(StagedBits::bytes)};
    float2 *reading_of = carve.take<float2>(StagedBits::items * 8);

    Span at = span_of(p, p.kv_heads, all_lengths);
    int b = at.b, head = at.head, span = at.index, first = at.first, count = at.count, rows = at.rows;
    const float *query_bits = all_query_bits + bits_at(p, b, p.q_heads, head * GROUP, first);
    const float *key_bits = all_bits + bits_at(p, b, p.kv_heads, head, first);
    i64 bits_head = bits_at(p, 0, 1, 1, 0);
    const Element *k = (const Element *)all_k + b * p.k_batch + first * p.k_token + head * p.k_head;
    const Element *v = (const Element *)all_v + b * p.v_batch + first * p.v_token + head * p.v_head;
    const Element *g = (const Element *)all_grad_o + b * p.g_batch + first * p.g_token + head * GROUP * p.g_head;
    i64 dk_token = (i64)p.kv_heads * HEAD_DIM, dv_token = (i64)p.kv_heads * VALUE_DIM;
    Gradient *dk = (Gradient *)all_dk + ((i64)b * p.tokens + first) * dk_token + head * HEAD_DIM;
    Gradient *dv = (Gradient *)all_dv + ((i64)b * p.tokens + first) * dv_token + head * VALUE_DIM;
    const float2 *readings = all_readings + ((i64)b * p.q_heads + head * GROUP) * p.tokens + first;
    float beta = all_heads[head].x, centre = all_heads[head].y;
    const float *matrix = all_after + matrix_at(p, b, p.kv_heads, head, span);
    bool dirty = all_bits[marks_at(p, b, p.kv_heads, head, span)] != 0.0f;
    for (int i = 0; i < GROUP; i++) dirty |= all_query_bits[marks_at(p, b, p.q_heads, head * GROUP + i, span)] != 0.0f;
    int warp = warp_index(), lane = threadIdx.x & 31;
    int row0 = (warp & 3) * 16;
    int last = (rows + ROWS - 1) / ROWS - 1;

    auto v_at = [&](int tile) { return v_tiles + (last - tile) % STAGES * VALUE_TILE; };
    auto g_at = [&](int tile, int in_group) { return g_tiles + ((last - tile) * GROUP + in_group) % STAGES * VALUE_TILE; };
    auto fetch_keys = [&](int tile) { fetch<HEAD_DIM, CARRYING>(k_tile, k + (i64)tile * ROWS * p.k_token, p.k_token, count - tile * ROWS); };
    auto fetch_others = [&](int tile, int in_group) {
        i64 at = tile * ROWS;
        fetch<VALUE_DIM, CARRYING>(g_at(tile, in_group), g + in_group * p.g_head + at * p.g_token, p.g_token, count - (int)at);
        if (in_group == 0) fetch<VALUE_DIM, CARRYING>(v_at(tile), v + at * p.v_token, p.v_token, count - (int)at);
    };
    if (warp >= CARRIERS) fetch_others(last, 0);
    load_planes(planes, all_planes + head * p.planes_stride);
    load_corners(corners);
    clear_tile(queries);
    clear_tile(keys);
    clear_tile(du);
    if (threadIdx.x < VALUE_DIM) later[threadIdx.x] = centre != 0.0f ? matrix[BUCKETS * COLUMNS + threadIdx.x] : 0.0f;

    // What weights of a head of a tile are made of, for the thread that makes them.
    auto fetch_hashes = [&](int tile, int in_group) {
        const float2 *of_rows = readings + (i64)in_group * p.tokens + tile * ROWS;
        StagedBits::for_each([&](int i) { copy_few<8>(reading_of + i, of_rows + i / TABLES, i / TABLES < count - tile * ROWS ? 8u : 0u); });
        of_queries.fetch(query_bits + in_group * bits_head + tile * ROWS * BITS);
        if (in_group == 0) of_keys.fetch(key_bits + tile * ROWS * BITS);
    };
    fetch_hashes(last, 0);
    // Weights of a head of a tile, its rows, and the next one's on their way.
    auto arrive = [&](int tile, int in_group) {
        int here = count - tile * ROWS;
        copies_done();
        of_queries.store(queries, beta, centre, here, [&](int i) { return reading_of[i].x; }, true);
        if (in_group == 0) of_keys.store(keys, beta, centre, here, [](int) { return 1.0f; }, false);
        StagedBits::for_each([&](int i) {
            if (i % TABLES != 0) return;
            inverses[i / TABLES] = reading_of[i].x;
            factors[i / TABLES] = reading_of[i].y;
        });
        bool same = in_group + 1 < GROUP;
        int next = same ? tile : tile - 1, next_head = same ? in_group + 1 : 0;
        if (dirty && warp >= CARRIERS) {
            clean<VALUE_DIM, ROWS, CARRYING>(g_at(tile, in_group));
            if (in_group == 0) clean<VALUE_DIM, ROWS, CARRYING>(v_at(tile));
        }
        barrier();
        if (next >= 0) fetch_hashes(next, next_head);
        if (warp < CARRIERS) return;
        if (in_group == 0) fetch_keys(tile);
        if (STAGES > 1 && next >= 0) fetch_others(next, next_head);
    };
    // The tile's k is there, and v and gradients are no longer read.
    auto half = [&](int tile, int in_group) {
        if (warp >= CARRIERS && in_group == 0) {
            copies_done();
            if (dirty) clean<HEAD_DIM, ROWS, CARRYING>(k_tile);
        }
        barrier();
        bool same = in_group + 1 < GROUP;
        if (STAGES == 1 && warp >= CARRIERS && (same || tile > 0)) fetch_others(same ? tile : tile - 1, same ? in_group + 1 : 0);
    };
    auto finish = [&](int tile, int row0) { store_hash_inputs(dk + tile * ROWS * dk_token, dk_token, du, planes, row0, rows - tile * ROWS, warp >> 2); };

    barrier();
    if (warp < CARRIERS) {
        // Warps with many products share their part of the multiprocessor with those of the other half that have few.
        int row0 = (BACKWARD_BLOCKS > 1 ? warp & 3 : 3 - (warp & 3)) * 16;
        Carried<CARRIERS> carried;
        carried.place(centre != 0.0f);
        carried.read(matrix);
        if (SPARE && centre != 0.0f) carried.scale_last(1.0f / (centre * BUCKETS));
        for (int tile = last; tile >= 0; tile--) {
            int here = count - tile * ROWS;
            float dvalue[WIDTH / 8][4];
            float added = 0.0f;
            for (int in_group = 0; in_group < GROUP; in_group++) {
                if (in_group == 0) {
                    carried.show(entry, masses);
                    if (SPARE && centre != 0.0f) carried.show_last(later, nullptr, centre * BUCKETS);
                }
                arrive(tile, in_group);
                Values gradients = {g_at(tile, in_group)};
                {
                    Kept<BUCKETS_UP, FineWeights> alpha(keys, row0);
                    // α·Ψᵀ over D of the tile's own queries: all at once, so that sums do not wait for each other.
                    float products[ROWS / 16][2][4];
#pragma unroll
                    for (int o = 0; o < ROWS / 16; o++) clear(products[o]);
#pragma unroll WRITTEN_OUT
                    for (int s = 0; s < BUCKETS_UP; s += 16) {
#pragma unroll
                        for (int o = 0; o < ROWS / 16; o++) {
                            if (row0 + o * 16 < ROWS) multiply(products[o][0], products[o][1], alpha.at(s), right(queries, row0 + o * 16, s));
                        }
                    }
                    Left<TERMS> seeing[ROWS / 16];
#pragma unroll
                    for (int o = 0; o < ROWS / 16; o++) {
                        if (row0 + o * 16 >= ROWS) continue;
#pragma unroll
                        for (int j = 0; j < 2; j++) {
#pragma unroll
                            for (int i = 0; i < 4; i++) {
                                int column = j * 8 + (lane & 3) * 2 + (i & 1), row = (lane >> 2) + (i >> 1) * 8;
                                if (o == 0 && column < row) products[o][j][i] = 0.0f;
                            }
                        }
                        if (SUMS_IN_ONE && centre != 0.0f) add_of_all(products[o], o, inverses + row0 + o * 16, centre * BUCKETS);
                        seeing[o] = as_left<TERMS>(products[o][0], products[o][1]);
                    }
#pragma unroll 1
                    for (int channel = 0; channel < VALUE_DIM; channel += WIDTH) {
                        if (in_group == 0) {
                            clear(dvalue);
#pragma unroll WRITTEN_OUT
                            for (int s = 0; s < BUCKETS_UP; s += 16) {
#pragma unroll
                                for (int c = 0; c < WIDTH; c += 16) multiply(dvalue[c / 8], dvalue[c / 8 + 1], alpha.at(s), right_turned(entry, s, channel + c));
                            }
                        }
#pragma unroll
                        for (int o = 0; o < ROWS / 16; o++) {
                            int other = row0 + o * 16;
                            if (other >= ROWS) continue;
                            Left<PLANE_TERMS> of_all;
                            if (!SUMS_IN_ONE && centre != 0.0f) {
                                float all[2][4];
                                clear(all);
                                add_of_all(all, o, inverses + other, centre * BUCKETS);
                                of_all = as_left<PLANE_TERMS>(all[0], all[1]);
                            }
#pragma unroll
                            for (int c = 0; c < WIDTH; c += 16) {
                                auto x = right_turned(gradients, other, channel + c);
                                multiply(dvalue[c / 8], dvalue[c / 8 + 1], seeing[o], x);
                                if (!SUMS_IN_ONE && centre != 0.0f) multiply(dvalue[c / 8], dvalue[c / 8 + 1], of_all, x);
                            }
                        }
                        if (in_group + 1 == GROUP) {
#pragma unroll
                            for (int j = 0; j < WIDTH / 8; j++) {
#pragma unroll
                                for (int i = 0; i < 4; i++) {
                                    if (row0 + (lane >> 2) + (i >> 1) * 8 < here) dvalue[j][i] += later[channel + j * 8 + (lane & 3) * 2 + (i & 1)];
                                }
                            }
                            store_tile<GRADIENT_TYPE, WIDTH / 8>(dv + tile * ROWS * dv_token, dv_token, dvalue, row0, channel, rows - tile * ROWS);
                        }
                    }
                }
                carried.add_scaled(queries, gradients, factors);
                if (!SPARE && centre != 0.0f && threadIdx.x < VALUE_DIM) {
                    for (int r = 0; r < ROWS; r++) added += inverses[r] * input_at<VALUE_PITCH>(gradients.at, r, threadIdx.x);
                }
                half(tile, in_group);
                if (!SPARE && in_group + 1 == GROUP && centre != 0.0f && threadIdx.x < VALUE_DIM) later[threadIdx.x] += centre * BUCKETS * added;
                if (in_group + 1 == GROUP) finish(tile, row0);
            }
        }
    } else {
        PlaneSums plane_sums;
        plane_sums.place(warp - CARRIERS);
        float of_beta[BITS_UP / 8][2];
#pragma unroll
        for (int j = 0; j < BITS_UP / 8; j++) of_beta[j][0] = of_beta[j][1] = 0.0f;
        for (int tile = last; tile >= 0; tile--) {
            int here = count - tile * ROWS;
            Values values = {v_at(tile)};
            float t[BITS_UP / 8][4], dalpha[BUCKETS_UP / 8][4];
            for (int in_group = 0; in_group < GROUP; in_group++) {
                arrive(tile, in_group);
                if (in_group == 0) load_bits(t, key_bits + tile * ROWS * BITS, row0, here);
                Values gradients = {g_at(tile, in_group)};
                {
                    if (in_group == 0) {
#pragma unroll
                        for (int j = 0; j < BUCKETS_UP / 8; j++) {
#pragma unroll
                            for (int i = 0; i < 4; i++) dalpha[j][i] = masses[j * 8 + (lane & 3) * 2 + (i & 1)];
                        }
                    }
#pragma unroll
                    for (int from = 0; from < ROWS / 16; from += AT_ONCE) {
                        if (row0 + from * 16 >= ROWS) continue;
                        float products[AT_ONCE][2][4];
#pragma unroll
                        for (int o = 0; o < AT_ONCE; o++) {
#pragma unroll
                            for (int j = 0; j < 2; j++) {
#pragma unroll
                                for (int i = 0; i < 4; i++) products[o][j][i] = factors[(row0 + (from + o) * 16) % ROWS + j * 8 + (lane & 3) * 2 + (i & 1)];
                            }
                        }
#pragma unroll WRITTEN_OUT
                        for (int c = 0; c < VALUE_DIM; c += 16) {
                            auto value = left(values, row0, c);
                            if (from == 0 && in_group == 0) {
#pragma unroll
                                for (int s = 0; s < BUCKETS_UP; s += 16) multiply(dalpha[s / 8], dalpha[s / 8 + 1], value, right(entry, s, c));
                            }
#pragma unroll
                            for (int o = 0; o < AT_ONCE; o++) {
                                int other = row0 + (from + o) * 16;
                                if (other < ROWS) multiply(products[o][0], products[o][1], value, right(gradients, other, c));
                            }
                        }
#pragma unroll
                        for (int o = 0; o < AT_ONCE; o++) {
                            int other = row0 + (from + o) * 16;
                            if (other >= ROWS) continue;
                            if (from + o == 0) {
#pragma unroll
                                for (int j = 0; j < 2; j++) {
#pragma unroll
                                    for (int i = 0; i < 4; i++) {
                                        if (j * 8 + (int)(lane & 3) * 2 + (i & 1) < (lane >> 2) + (i >> 1) * 8) products[o][j][i] = 0.0f;
                                    }
                                }
                            }
                            auto z = as_left<TERMS>(products[o][0], products[o][1]);
#pragma unroll
                            for (int s = 0; s < BUCKETS_UP; s += 16) multiply(dalpha[s / 8], dalpha[s / 8 + 1], z, right_turned(queries, other, s));
                        }
                    }
                    if (in_group + 1 == GROUP) {
#pragma unroll
                        for (int j = 0; j < BUCKETS_UP / 8; j++) {
#pragma unroll
                            for (int i = 0; i < 2; i++) {
                                int row = row0 + (lane >> 2) + i * 8;
                                float2 x = keys.get(row, j * 8 + (lane & 3) * 2);
                                bool real = row < here;
                                dalpha[j][2 * i] = real ? dalpha[j][2 * i] * (x.x + centre) : 0.0f;
                                dalpha[j][2 * i + 1] = real ? dalpha[j][2 * i + 1] * (x.y + centre) : 0.0f;
                            }
                        }
                        through_hash(dalpha, t, corners, du, of_beta, row0, beta);
                    }
                }
                half(tile, in_group);
                if (in_group + 1 < GROUP) continue;
                plane_sums.add(du, Keys{k_tile});
                finish(tile, row0);
            }
        }
        plane_sums.write(all_shares + (i64)blockIdx.x * BITS * (HEAD_DIM + 1));
        keep_of_beta(room, of_beta, warp - CARRIERS);
    }
    barrier();
    write_of_beta(all_shares + (i64)blockIdx.x * BITS * (HEAD_DIM + 1), room);
}
