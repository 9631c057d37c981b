// Attention of the query heads of one kv head over all keys of a span, or over the chosen ones: one block per (span of
// tokens, kv head and tile of heads, row), 16-bit keys and values. The last block of a kv head merges the spans.
//
// Each warp works alone on tiles of 16 keys, which it copies to shared memory some tiles ahead. Logits are a product of
// 16 rows of the query by 16 keys, values one of 16 rows of weights by the value rows. Numbers that 16 bits cannot hold
// are split into several that can; where there are at most 8 heads the other 8 rows carry the second part for free.
#include "partials.cuh"
#if SPARSE
#include "scoring.cuh"
#endif

#define WARPS 4
#define THREADS (WARPS * 32)
#define TILE 16
#define K_STEPS ((HEAD_DIM + 15) / 16)
#define V_STEPS ((VALUE_DIM + 15) / 16)
// Bytes of a row in shared memory: 16 spare ones keep the rows of a matrix in different banks.
#define K_ROW (K_STEPS * 32 + 16)
#define V_ROW (V_STEPS * 32 + 16)
#define STAGE (TILE * (K_ROW + V_ROW))
#define PACKED (HEADS <= 8)
#define ROWS (PACKED ? 1 : 2)
#define Q_PASSES (PACKED ? (Q_SPLITS + 1) / 2 : Q_SPLITS)
#define P_PASSES (PACKED ? (P_SPLITS + 1) / 2 : P_SPLITS)
#define RESULT (HEADS * (V_STEPS * 16 + 4))
// Bytes before the list of chosen keys.
#define TILES max_u32(WARPS * STAGES * STAGE, WARPS * RESULT * 4)
// Chosen keys that the list holds; a span may have more, one list after the other.
#define CHOSEN 2048
// Parts of a head that are read at once in the end, as registers allow.
#define TOGETHER (VALUE_DIM <= 128 ? 32 : 16)
// Large queries stay in shared memory, as each lane will want them.
#define QUERY_SHARED (Q_PASSES * K_STEPS > 8)

extern __shared__ __align__(16) u8 memory[];

// What rounding x to 16 bits leaves.
__device__ __forceinline__ float rest_of(float x) { return x - widen<KV_DTYPE>(narrow<KV_DTYPE>(x)); }

struct Work {
    const Call* p;
    u32 sequence, kv_head, first, count;
    // Sparse: tokens in the span, and which heads chose them from bit 16 on; addresses of the span's pages.
    const u32* chosen;
    const u64* page_bases;
};

// The page of a tile that has no gaps; past the last tile, of the last token.
__device__ __forceinline__ u64 page_of_tile(const Work& w, u32 tile) {
#if SPARSE
    return 0;
#else
    return page_of(*w.p, w.sequence, w.first + min_u32(tile * TILE, w.count - 1));
#endif
}

// Starts to copy tile `tile` to `stage`, by a warp.
__device__ __forceinline__ void copy_tile(const Work& w, u32 stage, u32 tile, u64 page, u32 lane) {
    u32 base = tile * TILE;
#if !SPARSE
    u32 first = w.first + min_u32(base, w.count - 1);
    u64 keys = key_row(page, w.kv_head, first), values = value_row(page, w.kv_head, first);
#endif
#pragma unroll
    for (u32 i = 0; i < (TILE * K_PIECES + 31) / 32; i++) {
        u32 at = i * 32 + lane, row = at / K_PIECES, piece = at % K_PIECES;
        if (TILE * K_PIECES % 32 == 0 || row < TILE) {
            bool valid = base + row < w.count;
#if SPARSE
            u32 token = w.chosen[valid ? base + row : 0] & 0xffffu;
            u64 from = key_row(w.page_bases[token / PAGE], w.kv_head, token) + piece * 16;
#else
            u64 from = keys + (valid ? row : 0) * (K_PIECES * 16) + piece * 16;
#endif
            copy_piece(stage + row * K_ROW + piece * 16, from, valid);
        }
    }
#pragma unroll
    for (u32 i = 0; i < (TILE * V_PIECES + 31) / 32; i++) {
        u32 at = i * 32 + lane, row = at / V_PIECES, piece = at % V_PIECES;
        if (TILE * V_PIECES % 32 == 0 || row < TILE) {
            bool valid = base + row < w.count;
#if SPARSE
            u32 token = w.chosen[valid ? base + row : 0] & 0xffffu;
            u64 from = value_row(w.page_bases[token / PAGE], w.kv_head, token) + piece * 16;
#else
            u64 from = values + (valid ? row : 0) * (V_PIECES * 16) + piece * 16;
#endif
            copy_piece(stage + TILE * K_ROW + row * V_ROW + piece * 16, from, valid);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) attend(ARGUMENTS) {
    CALL;
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 kv_head = blockIdx.y / HEAD_TILES, first_head = blockIdx.y % HEAD_TILES * HEADS;
    u32 heads = min_u32(HEADS, GROUP - first_head);
    u32 row_index = p.first_row + blockIdx.z;
    Row row = ROW_AT(row_index);
    u32 first = blockIdx.x * p.span;
    // What was chosen is not known yet, the query is.
    if (!SPARSE || first >= row.visible) wait_for_earlier();
    if (first >= row.visible) {
        // A query before the first key.
        if (row.visible == 0 && blockIdx.x == 0) {
            for (u32 i = threadIdx.x; i < heads * VALUE_DIM; i += THREADS) {
                u64 index = (u64)row_index * Q_HEADS + kv_head * GROUP + first_head + i / VALUE_DIM;
                store_element<OUT_DTYPE>(p.o, index * VALUE_DIM + i % VALUE_DIM, 0.0f);
                if (i % VALUE_DIM == 0) store_lse(p, index, 0.0f, 0.0f);
            }
        }
        return;
    }
    Work w;
    w.p = &p;
    w.sequence = row.sequence;
    w.kv_head = kv_head;
    w.first = first;
    w.count = min_u32(p.span, row.visible - first);

#if HEAD_DIM % 16 != 0 || VALUE_DIM % 16 != 0
    // What copies do not fill: channels beyond the last, which must be finite.
    for (u32 i = threadIdx.x; i < WARPS * STAGES * STAGE / 16; i += THREADS) ((uint4*)memory)[i] = uint4{0, 0, 0, 0};
    __syncthreads();
#endif

    u32 stage = 0;
    u32 stages = shared_address(memory) + warp * (STAGES * STAGE);
    auto start = [&](u32 tiles) {
#pragma unroll
        for (u32 s = 0; s < STAGES - 1; s++) {
            u32 tile = warp + s * WARPS;
            u32 to = stage + s >= STAGES ? stage + s - STAGES : stage + s;
            if (tile < tiles) copy_tile(w, stages + to * STAGE, tile, page_of_tile(w, tile), lane);
            copies_commit();
        }
    };
#if !SPARSE
    const u32 tiles = (w.count + TILE - 1) / TILE;
    start(tiles);
#endif

#if SPARSE
    // Tokens of a page are found by their place in the sequence, so spans start on whole pages or lie in one.
    u32* chosen = (u32*)(memory + TILES);
    u64* page_bases = (u64*)(chosen + CHOSEN);
    const u32 in_page = first % PAGE, span = w.count;
    for (u32 i = threadIdx.x; i < (in_page + span + PAGE - 1) / PAGE; i += THREADS)
        page_bases[i] = page_of(p, row.sequence, first + i * PAGE);
#endif

    // Rows of the query: lane / 4 and that plus 8; columns lane % 4 · 2 and on.
    i64 q_at = (row_index / p.tq) * p.q_strides.batch + (row_index % p.tq) * p.q_strides.token
        + (i64)(kv_head * GROUP + first_head) * p.q_strides.head;
    u32 of_row = lane / 4, pair = lane % 4 * 2;
    // The parts of the query, `[pass, row, channel]`: by few instructions, which come from memory too, one after the other.
    const u32 q_row = K_STEPS * 16 + 8;
#if SPARSE && !QUERY_SHARED && HEAD_DIM % 16 == 0 && VALUE_DIM % 16 == 0
    // Before the tiles.
    u16* parts = (u16*)memory;
#else
    __shared__ __align__(16) u16 parts[Q_PASSES * 16 * q_row];
#endif
    for (u32 i = threadIdx.x; i < Q_PASSES * 16 * q_row / 2; i += THREADS) ((u32*)parts)[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (u32 i = threadIdx.x; i < heads * HEAD_DIM; i += THREADS) {
        u32 head = i / HEAD_DIM, channel = i % HEAD_DIM;
        float x = input_element<Q_DTYPE>(p.q, q_at + head * p.q_strides.head + channel);
#pragma unroll
        for (u32 split = 0; split < Q_SPLITS; split++) {
            u32 row_of = PACKED ? split / 2 * 16 + split % 2 * 8 + head : split * 16 + head;
            parts[row_of * q_row + channel] = (u16)narrow<KV_DTYPE>(x);
            x = rest_of(x);
        }
    }
    __syncthreads();
    auto query_at = [&](u32(&a)[4], u32 pass, u32 step) {
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            a[i] = *(const u32*)&parts[(pass * 16 + of_row + i % 2 * 8) * q_row + step * 16 + i / 2 * 8 + pair];
    };
#if !QUERY_SHARED
    u32 query[Q_PASSES][K_STEPS][4];
#pragma unroll
    for (u32 pass = 0; pass < Q_PASSES; pass++)
#pragma unroll
        for (u32 step = 0; step < K_STEPS; step++) query_at(query[pass][step], pass, step);
#endif

    float scale = p.scale * LOG2_E;
    float values[V_STEPS * 2][4];
#pragma unroll
    for (u32 i = 0; i < V_STEPS * 2; i++)
#pragma unroll
        for (u32 c = 0; c < 4; c++) values[i][c] = 0.0f;
    float peak[ROWS], sum[ROWS];
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        peak[r] = MASKED;
        sum[r] = 0.0f;
    }

#if SPARSE
    const u32 score_heads = SCORE_ROWS == 1 ? 1 : HEADS;
    wait_for_earlier();
    const u32 score_head = kv_head * SCORE_ROWS + (SCORE_ROWS == 1 ? 0 : first_head);
    const u64 stride = ((u64)row.visible + 63) / 64 * 64;
    const u16* scores = p.scores + (u64)row.score_base * 64 + score_head * stride + first;
    u32 cuts[score_heads];
    bool needed = false;
#pragma unroll
    for (u32 h = 0; h < score_heads; h++) {
        cuts[h] = p.cuts[(u64)blockIdx.z * KV_HEADS * SCORE_ROWS + score_head + min_u32(h, heads - 1)];
        needed = needed || (cuts[h] != CUT_ALL && cuts[h] != CUT_NONE);
    }
    // Eight tokens a thread and round: one load of levels per head, some rounds ahead.
    const bool early = score_heads <= 4;
    const u32 rounds = HEAD_DIM + VALUE_DIM > 256 ? 1 : score_heads == 1 ? 4 : 2;
    uint4 ahead[rounds][early ? score_heads : 1];
    auto load_levels = [&](u32 round, u32 token) {
#pragma unroll
        for (u32 h = 0; early && h < score_heads; h++)
            if (token < span) ahead[round][h] = *(const uint4*)&scores[min_u32(h, heads - 1) * stride + token];
    };
#pragma unroll
    for (u32 r = 0; r < rounds; r++) load_levels(r, (r * THREADS + threadIdx.x) * 8);
    w.chosen = chosen;
    w.page_bases = page_bases;
    u32 scanned = 0;
    do {
    w.count = 0;
    while (scanned < span && w.count + THREADS * 8 <= CHOSEN) {
        u32 token = scanned + threadIdx.x * 8;
        u32 masks[8] = {};
#pragma unroll
        for (u32 h = 0; h < score_heads; h++) {
            u32 all = score_heads == 1 ? (1u << HEADS) - 1u : 1u << h;
            uint4 levels = {0, 0, 0, 0};
            if (early) levels = ahead[0][h];
            else if (needed && token < span) levels = *(const uint4*)&scores[min_u32(h, heads - 1) * stride + token];
            u32 words[4] = {levels.x, levels.y, levels.z, levels.w};
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                bool selected = is_selected(words[i / 2] >> (16 * (i % 2)) & 0xffffu, cuts[h]);
                if (cuts[h] == CUT_ALL || (cuts[h] != CUT_NONE && selected)) masks[i] |= all;
            }
        }
        scanned += THREADS * 8;
#pragma unroll
        for (u32 r = 1; r < rounds; r++)
#pragma unroll
            for (u32 h = 0; early && h < score_heads; h++) ahead[r - 1][h] = ahead[r][h];
        load_levels(rounds - 1, scanned + ((rounds - 1) * THREADS + threadIdx.x) * 8);
        u32 own = 0, total;
#pragma unroll
        for (u32 i = 0; i < 8; i++) {
            if (in_base(p, row, first + token + i)) masks[i] = (1u << HEADS) - 1u;
            if (token + i >= span) masks[i] = 0;
            own += masks[i] != 0 ? 1 : 0;
        }
        u32 at = w.count + block_scan<WARPS>(own, total) - own;
#pragma unroll
        for (u32 i = 0; i < 8; i++)
            if (masks[i] != 0) chosen[at++] = (in_page + token + i) | masks[i] << 16;
        w.count += total;
    }
    __syncthreads();
    const u32 tiles = (w.count + TILE - 1) / TILE;
    start(tiles);
#endif

    // Asked for a round before it is needed.
    u64 page = page_of_tile(w, warp + (STAGES - 1) * WARPS);
    for (u32 tile = warp; tile < tiles; tile += WARPS) {
        // The stage that was read in the round before is free: all lanes are past it.
        u32 later = tile + (STAGES - 1) * WARPS, to = stage == 0 ? STAGES - 1 : stage - 1;
        copies_wait<STAGES - 2>();
        __syncwarp();
        if (later < tiles) copy_tile(w, stages + to * STAGE, later, page, lane);
        page = page_of_tile(w, later + WARPS);
        copies_commit();
        u32 keys = stages + stage * STAGE, rows_of_values = keys + TILE * K_ROW;
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        // Two products of 8 keys each.
        float logits[2][4] = {};
        {
            // Lanes 0 to 7 point at keys 0 to 7, the next 8 at their other half, then keys 8 to 15.
            u32 at = keys + (lane % 8 + lane / 16 * 8) * K_ROW + lane / 8 % 2 * 16;
#pragma unroll
            for (u32 step = 0; step < K_STEPS; step++) {
                u32 b[4];
                load_matrices(b, at + step * 32);
#pragma unroll
                for (u32 pass = 0; pass < Q_PASSES; pass++) {
#if QUERY_SHARED
                    u32 a[4];
                    query_at(a, pass, step);
#else
                    const u32(&a)[4] = query[pass][step];
#endif
                    mma16<KV_DTYPE>(logits[0], a, b[0], b[1]);
                    mma16<KV_DTYPE>(logits[1], a, b[2], b[3]);
                }
            }
        }
        // weights[r][n][i]: row, eight keys, key.
        float weights[ROWS][2][2];
#pragma unroll
        for (u32 n = 0; n < 2; n++)
#pragma unroll
            for (u32 i = 0; i < 2; i++) {
                u32 key = tile * TILE + n * 8 + pair + i;
                bool inside = key < w.count;
#if SPARSE
                u32 mask = inside ? w.chosen[key] >> 16 : 0;
#endif
#pragma unroll
                for (u32 r = 0; r < ROWS; r++) {
                    float logit = PACKED ? logits[n][i] + logits[n][i + 2] : logits[n][2 * r + i];
#if SPARSE
                    bool seen = mask >> (of_row + 8 * r) & 1u;
#else
                    bool seen = inside;
#endif
                    weights[r][n][i] = seen ? logit * scale : MASKED;
                }
            }
        bool grew = false;
        float top[ROWS];
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            float most = fmaxf(fmaxf(weights[r][0][0], weights[r][0][1]), fmaxf(weights[r][1][0], weights[r][1][1]));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 1));
            most = fmaxf(most, __shfl_xor_sync(FULL_WARP, most, 2));
            top[r] = fmaxf(peak[r], most);
            grew = grew || top[r] > peak[r];
        }
        if (__any_sync(FULL_WARP, grew)) {
            float keep[ROWS];
#pragma unroll
            for (u32 r = 0; r < ROWS; r++) {
                keep[r] = exp2_fast(peak[r] - top[r]);
                sum[r] *= keep[r];
                peak[r] = top[r];
            }
#pragma unroll
            for (u32 i = 0; i < V_STEPS * 2; i++)
#pragma unroll
                for (u32 c = 0; c < 4; c++) values[i][c] *= keep[PACKED ? 0 : c / 2];
        }
#pragma unroll
        for (u32 r = 0; r < ROWS; r++)
#pragma unroll
            for (u32 n = 0; n < 2; n++)
#pragma unroll
                for (u32 i = 0; i < 2; i++) {
                    float logit = weights[r][n][i];
                    float weight = logit <= MASKED ? 0.0f : exp2_fast(logit - peak[r]);
                    weights[r][n][i] = weight;
                    sum[r] += weight;
                }
        u32 a[P_PASSES][4];
#pragma unroll
        for (u32 n = 0; n < 2; n++)
#pragma unroll
            for (u32 r = 0; r < 2; r++) {
                float x = weights[PACKED ? 0 : r][n][0], y = weights[PACKED ? 0 : r][n][1];
                if (PACKED && r == 1) {
                    x = rest_of(x);
                    y = rest_of(y);
                }
#pragma unroll
                for (u32 pass = 0; pass < P_PASSES; pass++) {
                    bool used = !PACKED || 2 * pass + r < P_SPLITS;
                    a[pass][n * 2 + r] = used ? pack_pair<KV_DTYPE>(x, y) : 0;
                    x = rest_of(x);
                    y = rest_of(y);
                    if (PACKED) {
                        x = rest_of(x);
                        y = rest_of(y);
                    }
                }
            }
        {
            // Lanes 0 to 15 point at the 16 keys, 8 channels; the others at the next 8 channels.
            u32 at = rows_of_values + lane % 16 * V_ROW + lane / 16 * 16;
#pragma unroll
            for (u32 step = 0; step < V_STEPS; step++) {
                u32 b[4];
                load_matrices_transposed(b, at + step * 32);
                // The matrix unit cuts off what it adds up, always towards zero: over a long span that bends the sum. So it
                // adds within a tile only.
                float of_tile[2][4] = {};
#pragma unroll
                for (u32 pass = 0; pass < P_PASSES; pass++) {
                    mma16<KV_DTYPE>(of_tile[0], a[pass], b[0], b[1]);
                    mma16<KV_DTYPE>(of_tile[1], a[pass], b[2], b[3]);
                }
#pragma unroll
                for (u32 i = 0; i < 2; i++)
#pragma unroll
                    for (u32 c = 0; c < 4; c++) values[step * 2 + i][c] += of_tile[i][c];
            }
        }
    }
    copies_wait<0>();
#if SPARSE
    // The list is read to its end before it is filled anew.
    __syncthreads();
    } while (scanned < span);
#endif
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
        sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 1);
        sum[r] += __shfl_xor_sync(FULL_WARP, sum[r], 2);
    }

    // The warps' results, side by side in shared memory, then merged in order.
    __syncthreads();
    float* results = (float*)memory;
    {
        float* mine = results + warp * RESULT;
        const u32 width = V_STEPS * 16 + 4;
#pragma unroll
        for (u32 r = 0; r < ROWS; r++) {
            u32 head = of_row + 8 * r;
            if (head < HEADS) {
                if (lane % 4 == 0) {
                    mine[head * width] = peak[r];
                    mine[head * width + 1] = sum[r];
                }
#pragma unroll
                for (u32 i = 0; i < V_STEPS * 2; i++) {
                    float x = PACKED ? values[i][0] + values[i][2] : values[i][2 * r];
                    float y = PACKED ? values[i][1] + values[i][3] : values[i][2 * r + 1];
                    mine[head * width + 4 + i * 8 + pair] = x;
                    mine[head * width + 4 + i * 8 + pair + 1] = y;
                }
            }
        }
    }
    __syncthreads();
    const u32 first_q = kv_head * GROUP + first_head;
    for (u32 head = warp; head < heads; head += WARPS) {
        Merged merged = merge_of<WARPS>(results + head * (V_STEPS * 16 + 4), RESULT, WARPS);
        if (row.part_count == 1) {
            store_merged(p, (u64)row_index * Q_HEADS + first_q + head, merged);
            continue;
        }
        float* part = p.partials + ((u64)row.part_base + (u64)(first_q + head) * row.part_count + blockIdx.x) * PART_STRIDE;
        store_part(part, merged);
    }
    if (row.part_count > 1 && is_last(&p.arrivals[(u64)blockIdx.z * gridDim.y + blockIdx.y], row.part_count))
        merge_parts<THREADS, TOGETHER>(p, row, row_index, first_q, heads);
}
