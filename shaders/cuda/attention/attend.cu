// Attention of the query heads of one kv head over all keys of a span, or over the chosen ones: one block per (span of
// tokens, kv head and tile of heads, row), 16-bit keys and values. The last block of a kv head merges the spans.
//
// Each warp works alone on tiles of 16 keys, which it copies to shared memory some tiles ahead.
#include "attend_tile.cuh"
#if SPARSE
#include "scoring.cuh"
#endif

#define THREADS (WARPS * 32)
// Bytes of a row in shared memory: 16 spare ones keep the rows of a matrix in different banks.
#define K_ROW (K_STEPS * 32 + 16)
#define V_ROW (V_STEPS * 32 + 16)
#define STAGE (TILE * (K_ROW + V_ROW))
// Bytes before the list of chosen keys.
#define TILES max_u32(WARPS * STAGES * STAGE, WARPS * RESULT * 4)
// Chosen keys that the list holds; a span may have more, one list after the other.
#define CHOSEN 2048

extern __shared__ __align__(16) u8 memory[];

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
    Heads heads = heads_of_block();
    u32 row_index = p.first_row + blockIdx.z;
    Row row = ROW_AT(row_index);
    u32 first = blockIdx.x * p.span;
    // What was chosen is not known yet, the query is.
    if (!SPARSE || first >= row.visible) wait_for_earlier();
    if (first >= row.visible) {
        if (row.visible == 0 && blockIdx.x == 0) store_nothing<THREADS>(p, row_index, heads);
        return;
    }
    Work w;
    w.p = &p;
    w.sequence = row.sequence;
    w.kv_head = heads.kv_head;
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

#if SPARSE && !QUERY_SHARED && HEAD_DIM % 16 == 0 && VALUE_DIM % 16 == 0
    // Before the tiles.
    u16* parts = (u16*)memory;
#else
    __shared__ __align__(16) u16 parts[QUERY_PARTS];
#endif
    split_query<THREADS>(p, parts, row_index, heads);
    Attention attention;
    attention.begin(p, parts);

#if SPARSE
    const u32 score_heads = SCORE_ROWS == 1 ? 1 : HEADS;
    wait_for_earlier();
    const u32 score_head = heads.kv_head * SCORE_ROWS + (SCORE_ROWS == 1 ? 0 : heads.first);
    const u64 stride = ((u64)row.visible + 63) / 64 * 64;
    const u16* scores = p.scores + (u64)row.score_base * 64 + score_head * stride + first;
    u32 cuts[score_heads];
    bool needed = false;
#pragma unroll
    for (u32 h = 0; h < score_heads; h++) {
        cuts[h] = p.cuts[(u64)blockIdx.z * KV_HEADS * SCORE_ROWS + score_head + min_u32(h, heads.count - 1)];
        needed = needed || (cuts[h] != CUT_ALL && cuts[h] != CUT_NONE);
    }
    // Eight tokens a thread and round: one load of levels per head, some rounds ahead.
    const bool early = score_heads <= 4;
    const u32 rounds = HEAD_DIM + VALUE_DIM > 256 ? 1 : score_heads == 1 ? 4 : 2;
    uint4 ahead[rounds][early ? score_heads : 1];
    auto load_levels = [&](u32 round, u32 token) {
#pragma unroll
        for (u32 h = 0; early && h < score_heads; h++)
            if (token < span) ahead[round][h] = *(const uint4*)&scores[min_u32(h, heads.count - 1) * stride + token];
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
            else if (needed && token < span) levels = *(const uint4*)&scores[min_u32(h, heads.count - 1) * stride + token];
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
        u32 keys_at = keys + (lane % 8 + lane / 16 * 8) * K_ROW + lane / 8 % 2 * 16;
        u32 values_at = rows_of_values + lane % 16 * V_ROW + lane / 16 * 16;
        attention.add(keys_at, values_at, [&](u32 of_tile) {
            u32 key = tile * TILE + of_tile;
            bool inside = key < w.count;
#if SPARSE
            return Some{inside ? w.chosen[key] >> 16 : 0};
#else
            return All{inside};
#endif
        });
    }
    copies_wait<0>();
#if SPARSE
    // The list is read to its end before it is filled anew.
    __syncthreads();
    } while (scanned < span);
#endif
    __syncthreads();
    float* results = (float*)memory;
    attention.store(results + warp * RESULT);
    __syncthreads();
    merge_results<THREADS>(p, row, row_index, heads, results);
}
