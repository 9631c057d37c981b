// Attention of the query heads of one kv head over all keys of a span, or over the chosen ones: one block per (span of
// tokens, kv head and tile of heads, row), 16-bit keys and values. The last block of a kv head merges the spans.
#define WARPS 4
#define THREADS (WARPS * 32)
#include "tiles.cuh"
#if SPARSE
#include "scoring.cuh"
#endif

// Bytes before the list of chosen keys.
#define TILES max_u32(WARPS * STAGES * STAGE, WARPS * RESULT * 4)
// Chosen keys that the list holds; a span may have more, one list after the other.
#define CHOSEN 2048

extern __shared__ __align__(16) u8 memory[];

extern "C" __global__ void __launch_bounds__(THREADS, 2) attend(ARGUMENTS) {
    CALL;
    u32 kv_head = blockIdx.y / HEAD_TILES, first_head = blockIdx.y % HEAD_TILES * HEADS;
    u32 heads = min_u32(HEADS, GROUP - first_head);
    u32 row_index = p.first_row + blockIdx.z;
    Row row = p.rows[row_index];
    u32 first = blockIdx.x * p.span;
    wait_for_earlier();
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
    Tiles work;
    Work& w = work.w;
    w.p = &p;
    w.sequence = row.sequence;
    w.kv_head = kv_head;
    w.first = first;
    w.count = min_u32(p.span, row.visible - first);
    work.lane = threadIdx.x & 31;
    work.warp = threadIdx.x >> 5;
    work.stages = shared_address(memory) + work.warp * (STAGES * STAGE);
    work.stage = 0;
    // Rows of shared memory that copies do not fill: channels beyond the last, which must be finite.
#if HEAD_DIM % 16 != 0 || VALUE_DIM % 16 != 0
    for (u32 i = threadIdx.x; i < WARPS * STAGES * STAGE / 16; i += THREADS) ((uint4*)memory)[i] = uint4{0, 0, 0, 0};
    __syncthreads();
#endif
#if !SPARSE
    const u32 tiles = (w.count + TILE - 1) / TILE;
    work.start(tiles);
#endif
    work.load_query(row_index, first_head, heads);
#if QUERY_SHARED
    __syncthreads();
#endif

#if SPARSE
    // Tokens of a page are found by their place in the sequence, so spans start on whole pages or lie in one.
    u32* chosen = (u32*)(memory + TILES);
    u64* page_bases = (u64*)(chosen + CHOSEN);
    const u32 score_heads = SCORE_ROWS == 1 ? 1 : HEADS;
    const u32 in_page = first % PAGE, span = w.count;
    for (u32 i = threadIdx.x; i < (in_page + span + PAGE - 1) / PAGE; i += THREADS)
        page_bases[i] = page_of(p, row.sequence, first + i * PAGE);
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
    // Eight tokens a thread: one load of levels per head, ahead of time.
    const bool early = score_heads <= 4;
    uint4 ahead[early ? score_heads : 1];
    auto load_levels = [&](u32 token) {
#pragma unroll
        for (u32 h = 0; early && h < score_heads; h++)
            if (needed && token < span) ahead[h] = *(const uint4*)&scores[min_u32(h, heads - 1) * stride + token];
    };
    load_levels(threadIdx.x * 8);
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
            if (early) levels = ahead[h];
            else if (needed && token < span) levels = *(const uint4*)&scores[min_u32(h, heads - 1) * stride + token];
            u32 words[4] = {levels.x, levels.y, levels.z, levels.w};
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                bool selected = is_selected(words[i / 2] >> (16 * (i % 2)) & 0xffffu, cuts[h]);
                if (cuts[h] == CUT_ALL || (cuts[h] != CUT_NONE && selected)) masks[i] |= all;
            }
        }
        scanned += THREADS * 8;
        load_levels(scanned + threadIdx.x * 8);
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
    work.start(tiles);
#endif
    work.run(tiles);
#if SPARSE
    // The list is read to its end before it is filled anew.
    __syncthreads();
    } while (scanned < span);
#endif
    // The warps' results, side by side in shared memory, then merged in order.
    __syncthreads();
    float* results = (float*)memory;
    work.store(results);
    __syncthreads();
    for (u32 i = threadIdx.x; i < heads * VALUE_DIM; i += THREADS) {
        u32 head = i / VALUE_DIM, channel = i % VALUE_DIM;
        float top, total, value;
        merge_warps(results, head, channel, top, total, value);
        u32 q_head = kv_head * GROUP + first_head + head;
        if (row.part_count == 1) {
            u64 index = (u64)row_index * Q_HEADS + q_head;
            store_element<OUT_DTYPE>(p.o, index * VALUE_DIM + channel, total > 0.0f ? divide(value, total) : 0.0f);
            if (channel == 0) store_lse(p, index, top, total);
        } else {
            float* part = p.partials + ((u64)row.part_base + (u64)q_head * row.part_count + blockIdx.x) * PART_STRIDE;
            part[4 + channel] = value;
            if (channel == 0) {
                part[0] = top;
                part[1] = total;
            }
        }
    }
    if (row.part_count > 1 && is_last(&p.arrivals[(u64)blockIdx.z * gridDim.y + blockIdx.y], row.part_count))
        merge_parts<THREADS>(p, row, row_index, kv_head * GROUP + first_head, heads);
}
