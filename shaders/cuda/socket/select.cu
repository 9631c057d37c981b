// The exact selection of a row: one block per (span of tokens, score row). Keys above the bins that the threshold may
// lie in are selected; those within are scored again, exactly, and the row's last block picks the best of them, the
// lower token first where scores are equal. Their levels become LEVEL_SELECTED or 0.
#include "scoring.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)
// Tokens looked through before those found are scored, and how many may be found.
#define BATCH 65536
#define MINE 2048
// Candidates of a row that are compared each with each.
#define RANKED 256
// Loads of eight levels that are under way together.
#define AT_ONCE 2

struct Found {
    u32 low, high, above, total;
};

// Bins that the threshold may lie in, how many keys are above them, and how many there are.
__device__ Found find_bins(const Call& p, const u32* histogram, const Range& range, float absolute, u32 wanted) {
    __shared__ u32 counts[BINS];
    __shared__ u32 chosen;
    const u32 own = BINS / THREADS;
    // From the highest bin down: each thread owns neighbouring bins.
    u32 top = BINS - 1 - threadIdx.x * own, sum = 0;
    for (u32 i = 0; i < own; i++) {
        u32 count = histogram[top - i];
        counts[top - i] = count;
        sum += count;
    }
    if (threadIdx.x == 0) chosen = 0;
    u32 total;
    u32 upto = block_scan<WARPS>(sum, total);
    if (upto >= wanted && upto - sum < wanted) {
        u32 above = upto - sum, bin = top;
        for (u32 i = 0; i < own; i++) {
            bin = top - i;
            if (above + counts[bin] >= wanted) break;
            above += counts[bin];
        }
        chosen = bin;
    }
    __syncthreads();
    u32 first = chosen << BIN_SHIFT, last = first + (1u << BIN_SHIFT) - 1;
    u32 margin = max_u32(margin_of(first, range, absolute), margin_of(last, range, absolute));
    Found found;
    found.low = (first > margin ? first - margin : 0) >> BIN_SHIFT;
    found.high = min_u32((last + margin) >> BIN_SHIFT, BINS - 1);
    // Keys above the highest of these bins.
    u32 higher = 0;
    for (u32 i = 0; i < own; i++)
        if (top - i > found.high) higher += counts[top - i];
    u32 above;
    block_scan<WARPS>(higher, above);
    found.above = above;
    found.total = total;
    return found;
}

// Error of stored sums in units of the largest gain, beside the relative one.
__device__ float absolute_error(const Call& p, const Row& row, u32 kv_head, u64 table_row, u32 lane) {
#if FAST == 2
    // Half a unit of the fixed point numbers, for each bit.
    const float* u = p.tables + table_row * TABLE_ROW + AT_PROJECTIONS;
    float largest = 0.0f;
    for (u32 i = lane; i < BITS; i += 32) largest = fmaxf(largest, fabsf(u[i]));
    for (u32 step = 16; step > 0; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
    return largest_gain(p, row.slot, kv_head) * largest * (0.51f * BITS / 16256.0f);
#elif FAST == 1
    // Halves below the smallest normal one.
    return largest_gain(p, row.slot, kv_head) * (TABLES * 2.4e-7f);
#else
    return 0.0f;
#endif
}

extern "C" __global__ void __launch_bounds__(THREADS, 2) select_keys(ARGUMENTS) {
    CALL;
    __shared__ u32 mine[MINE];
    __shared__ u32 mine_count;
    __shared__ u32 digits[256];
    __shared__ u32 picked, picked_above, place;
    u32 lane = threadIdx.x & 31;
    u32 score_row = blockIdx.y;
    u32 head = score_row % (KV_HEADS * SCORE_ROWS);
    u32 kv_head = head / SCORE_ROWS;
    Row row = p.rows[p.first_row + score_row / (KV_HEADS * SCORE_ROWS)];
    u64 table_row = (u64)(score_row / SCORE_ROWS) * SCORING_HEADS + (SCORE_ROWS == 1 ? 0 : head % SCORE_ROWS);
    wait_for_earlier();
    bool dense = row.heavy == 0 || row.heavy >= row.visible;
    u32 spans = (row.visible + p.span - 1) / p.span;
    if (dense || blockIdx.x >= spans) {
        // Nothing above the sink and window, or everything.
        if (dense && blockIdx.x == 0 && threadIdx.x == 0)
            p.cuts[score_row] = row.heavy == 0 ? CUT_NONE : CUT_ALL;
        return;
    }
    u32* histogram = p.histogram + (u64)score_row * (BINS + 1);
    Range range = range_of(p, row, kv_head, table_row, lane);
    float absolute = absolute_error(p, row, kv_head, table_row, lane);
    Found found = find_bins(p, histogram, range, absolute, row.heavy);
    if (found.total <= row.heavy) {
        // Fewer compete than there is room for.
        if (blockIdx.x == 0 && threadIdx.x == 0) p.cuts[score_row] = CUT_ALL;
        return;
    }
    u64 stride = ((u64)row.visible + 63) / 64;
    u16* scores = p.scores + ((u64)row.score_base + head * stride) * 64;
    u32* candidates = p.candidates + (u64)score_row * CANDIDATES * 2;
    u32 first = blockIdx.x * p.span, end = min_u32(row.visible, first + p.span);
    const float* tables = p.tables + table_row * TABLE_ROW;
#if EXACT_HEADS * TABLE_ROW <= 5632
    __shared__ __align__(16) float near_tables[EXACT_HEADS * TABLE_ROW];
    for (u32 i = threadIdx.x; i < EXACT_HEADS * TABLE_ROW / 4; i += THREADS) ((float4*)near_tables)[i] = ((const float4*)tables)[i];
    tables = near_tables;
#endif
    u32 low_level = found.low << BIN_SHIFT, high_level = (found.high + 1) << BIN_SHIFT;
    for (u32 base = first; base < end; base += BATCH) {
        __syncthreads();
        if (threadIdx.x == 0) mine_count = 0;
        __syncthreads();
        u32 upto = min_u32(end, base + BATCH);
        for (u32 token = base + threadIdx.x * 8; token < upto; token += THREADS * 8 * AT_ONCE) {
            // Rows are padded to whole 64 scores.
            uint4 levels[AT_ONCE];
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++)
                if (token + j * THREADS * 8 < upto) levels[j] = *(const uint4*)&scores[token + j * THREADS * 8];
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) {
                u32 at_token = token + j * THREADS * 8;
                if (at_token >= upto) break;
                u32 words[4] = {levels[j].x, levels[j].y, levels[j].z, levels[j].w};
#pragma unroll
                for (u32 i = 0; i < 8; i++) {
                    u32 level = words[i / 2] >> (16 * (i % 2)) & 0xffffu;
                    if (level - low_level >= high_level - low_level || at_token + i >= upto) continue;
#if DISJOINT
                    if (in_base(p, row, at_token + i)) continue;
#endif
                    u32 at = atomicAdd(&mine_count, 1u);
                    if (at < MINE) mine[at] = at_token + i;
                }
            }
        }
        __syncthreads();
        u32 count = mine_count;
        if (threadIdx.x == 0 && count > 0) place = atomicAdd(&histogram[BINS], count);
        __syncthreads();
        // A row with more candidates than a list holds is searched whole.
        if (count <= MINE && count > 0 && place + count <= CANDIDATES) {
            for (u32 i = threadIdx.x; i < count; i += THREADS) {
                u32 key = order_key(exact_score(p, tables, row.sequence, kv_head, mine[i]));
                *(uint2*)&candidates[(place + i) * 2] = uint2{key, mine[i]};
            }
        } else if (count > 0 && threadIdx.x == 0) {
            atomicMax(&histogram[BINS], CANDIDATES + 1);
        }
    }
    if (!is_last(&p.arrivals[score_row], spans)) return;

    u32 listed = ((volatile u32*)histogram)[BINS];
    bool whole = listed > CANDIDATES;
    u32 count = whole ? row.visible : listed;
    u32 wanted = row.heavy - found.above;
    if (threadIdx.x == 0) p.cuts[score_row] = high_level;
    if (!whole && count <= RANKED) {
        // Few enough to compare each with each: two threads a candidate.
        __shared__ uint2 ranked[RANKED];
        for (u32 i = threadIdx.x; i < count; i += THREADS) ranked[i] = uint2{candidates[i * 2], candidates[i * 2 + 1]};
        __syncthreads();
        uint2 own = ranked[min_u32(threadIdx.x / 2, RANKED - 1)];
        u32 before = 0;
        for (u32 i = threadIdx.x % 2; i < count; i += 2) {
            uint2 other = ranked[i];
            before += other.x > own.x || (other.x == own.x && other.y < own.y) ? 1 : 0;
        }
        before += __shfl_xor_sync(FULL_WARP, before, 1);
        if (threadIdx.x / 2 < count && threadIdx.x % 2 == 0) scores[own.y] = before < wanted ? LEVEL_SELECTED : 0;
        return;
    }
    u32 key_prefix = 0, token_prefix = 0;
    bool exhausted = false;
    for (u32 round = 0; round < 8 && !exhausted; round++) {
        u32 shift = 24 - (round & 3) * 8;
        // Bits above the current digit; none in the first round of each half.
        u32 mask = (round & 3) == 0 ? 0 : 0xffffffffu << (shift + 8);
        __syncthreads();
        if (threadIdx.x < 256) digits[threadIdx.x] = 0;
        __syncthreads();
        for (u32 i = threadIdx.x; i < count; i += THREADS) {
            u32 key, token;
            if (whole) {
                u32 level = scores[i];
                token = i;
                bool contested = level >= low_level && level < high_level;
#if DISJOINT
                contested = contested && !in_base(p, row, token);
#endif
                if (!contested) continue;
                key = order_key(exact_score(p, tables, row.sequence, kv_head, token));
            } else {
                key = candidates[i * 2];
                token = candidates[i * 2 + 1];
            }
            if (round < 4) {
                if ((key & mask) == (key_prefix & mask)) atomicAdd(&digits[key >> shift & 255u], 1u);
            } else if (key == key_prefix && (~token & mask) == (token_prefix & mask)) {
                atomicAdd(&digits[~token >> shift & 255u], 1u);
            }
        }
        __syncthreads();
        // Thread 0 owns the largest digit.
        u32 own = threadIdx.x < 256 ? digits[255 - threadIdx.x] : 0, total;
        u32 upto = block_scan<WARPS>(own, total);
        if (upto >= wanted && upto - own < wanted) {
            picked = 255 - threadIdx.x;
            picked_above = upto - own;
        }
        __syncthreads();
        wanted -= picked_above;
        if (round < 4) key_prefix |= picked << shift;
        else token_prefix |= picked << shift;
        // All keys of the last digit are wanted: no ties to break.
        if (round == 3 && digits[picked] == wanted) exhausted = true;
    }
    u32 last_token = exhausted ? 0xffffffffu : ~token_prefix;
    __syncthreads();
    for (u32 i = threadIdx.x; i < count; i += THREADS) {
        u32 key, token;
        if (whole) {
            u32 level = scores[i];
            token = i;
            bool contested = level >= low_level && level < high_level;
#if DISJOINT
            contested = contested && !in_base(p, row, token);
#endif
            if (!contested) continue;
            key = order_key(exact_score(p, tables, row.sequence, kv_head, token));
        } else {
            key = candidates[i * 2];
            token = candidates[i * 2 + 1];
        }
        bool selected = key > key_prefix || (key == key_prefix && token <= last_token);
        scores[token] = selected ? LEVEL_SELECTED : 0;
    }
    let_later_start();
}
