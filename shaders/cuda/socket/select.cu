// The exact selection of a row: one block per (span of tokens, score row). Keys above the bins that the threshold may
// lie in are selected; those within are scored again, exactly, and the row's last block picks the best of them, the
// lower token first where scores are equal. Their levels become LEVEL_SELECTED; the others' are below the cut.
#include "scoring.cuh"

#define THREADS 512
#define WARPS (THREADS / 32)
// As registers allow.
#define BLOCKS_TOGETHER (EXACT_HEADS > 1 ? 1 : 2)
// Tokens looked through before those found are scored, and how many may be found.
#define BATCH 65536
#define MINE 2048
// Candidates of a row that are compared each with each; more are told apart by their digits first.
#define RANKED 256
#define DIGIT_BITS 11
// Candidates of a batch, up to which eight lanes share one.
#define SHARED_BATCH 256
// Loads of eight levels, and of listed candidates, that are under way together.
#define AT_ONCE 2
#define EACH_AT_ONCE 4

struct Found {
    u32 low, high, above, total;
};

// Bins that the threshold may lie in, how many keys are above them, and how many there are.
__device__ Found find_bins(const Call& p, const u32* histogram, u32* counts, const Range& range, float absolute, u32 wanted) {
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
    // Half a unit of the fixed point numbers for each bit, times the power of two that it counts for: 15 / 4 on average.
    const float* u = p.tables + table_row * TABLE_ROW + AT_PROJECTIONS;
    float largest = 0.0f;
    for (u32 i = lane; i < BITS; i += 32) largest = fmaxf(largest, fabsf(u[i]));
    for (u32 step = 16; step > 0; step >>= 1) largest = fmaxf(largest, __shfl_xor_sync(FULL_WARP, largest, step));
    return largest_gain(p, row.slot, kv_head) * largest * (0.51f * 3.75f * BITS / 16256.0f);
#elif FAST == 1
    // Halves below the smallest normal one.
    return largest_gain(p, row.slot, kv_head) * (TABLES * 2.4e-7f);
#else
    return 0.0f;
#endif
}

// Whether so many keys are candidates, because the stored scores are of halves or small numbers, that warps collect them
// before they join the block's list. Elsewhere that costs more than it spares.
#define COLLECT_FIRST PRODUCT

#if COLLECT_FIRST
// Values that a warp's lanes found, which join a list of the block 32 at a time.
struct Queue {
    // 64 of the warp's own.
    u32* own;
    u32* list;
    u32* counter;
    u32 room, count;

    // By all lanes: those that `have` a value add it.
    __device__ __forceinline__ void push(bool have, u32 value) {
        u32 lane = threadIdx.x & 31, mask = __ballot_sync(FULL_WARP, have);
        if (have) own[count + __popc(mask & ((1u << lane) - 1u))] = value;
        count += __popc(mask);
        __syncwarp();
        if (count < 32) return;
        flush(32);
        u32 rest = own[32 + lane];
        __syncwarp();
        own[lane] = rest;
        count -= 32;
        __syncwarp();
    }

    __device__ __forceinline__ void flush(u32 values) {
        u32 lane = threadIdx.x & 31, place = 0;
        if (lane == 0) place = atomicAdd(counter, values);
        place = __shfl_sync(FULL_WARP, place, 0) + lane;
        if (lane < values && place < room) list[place] = own[lane];
    }

    __device__ __forceinline__ void finish() {
        if (count > 0) flush(count);
        count = 0;
        __syncwarp();
    }
};
#endif

// The candidates of a row: as listed, or, where there is no list, as the levels say, scored whenever they are wanted.
struct Candidates {
    const Call& p;
    const Row& row;
    const float* tables;
    const u16* scores;
    const u32* list;
    u32 kv_head, count, low_level, high_level;

    // Calls `use` with the order key and the token of each, and whether there is one: a block's threads share them, and
    // all lanes of a warp call it together.
    template <class Use> __device__ __forceinline__ void each(Use use) const {
        if (list) {
            for (u32 base = threadIdx.x; base - threadIdx.x % 32 < count; base += THREADS * EACH_AT_ONCE) {
                uint2 batch[EACH_AT_ONCE];
#pragma unroll
                for (u32 j = 0; j < EACH_AT_ONCE; j++)
                    if (base + j * THREADS < count) batch[j] = *(const uint2*)&list[(base + j * THREADS) * 2];
#pragma unroll
                for (u32 j = 0; j < EACH_AT_ONCE; j++) use(batch[j].x, batch[j].y, base + j * THREADS < count);
            }
            return;
        }
        for (u32 i = threadIdx.x; i - threadIdx.x % 32 < count; i += THREADS) {
            u32 level = i < count ? scores[i] : 0;
            bool contested = i < count && level >= low_level && level < high_level;
#if DISJOINT
            contested = contested && !in_base(p, row, i);
#endif
            use(contested ? order_key(exact_score(p, tables, row.sequence, kv_head, i)) : 0, i, contested);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_TOGETHER) select_keys(ARGUMENTS) {
    CALL;
    __shared__ u32 mine[MINE], mine_keys[MINE];
    __shared__ u32 mine_count;
#if COLLECT_FIRST
    __shared__ u32 queues[WARPS][64];
#endif
    __shared__ u32 counts[BINS];
    __shared__ u32 place;
    u32 lane = threadIdx.x & 31;
    u32 score_row = blockIdx.y;
    u32 head = score_row % (KV_HEADS * SCORE_ROWS);
    u32 kv_head = head / SCORE_ROWS;
    Row row = p.rows[p.first_row + score_row / (KV_HEADS * SCORE_ROWS)];
    u64 table_row = (u64)(score_row / SCORE_ROWS) * SCORING_HEADS + (SCORE_ROWS == 1 ? 0 : head % SCORE_ROWS);
    wait_for_earlier();
    let_later_start();
    bool dense = row.heavy == 0 || row.heavy >= row.visible;
    u32 spans = (row.visible + p.span - 1) / p.span;
    if (dense || blockIdx.x >= spans) {
        // Nothing above the sink and window, or everything.
        if (dense && blockIdx.x == 0 && threadIdx.x == 0)
            p.cuts[score_row] = row.heavy == 0 ? CUT_NONE : CUT_ALL;
        return;
    }
    u64 stride = ((u64)row.visible + 63) / 64;
    u16* scores = p.scores + ((u64)row.score_base + head * stride) * 64;
    u32 first = blockIdx.x * p.span, end = min_u32(row.visible, first + p.span);
    // Rows are padded to whole 64 scores. The first are on their way while the threshold is found.
    uint4 levels[AT_ONCE];
    auto load_levels = [&](u32 token, u32 upto) {
#pragma unroll
        for (u32 j = 0; j < AT_ONCE; j++)
            if (token + j * THREADS * 8 < upto) levels[j] = *(const uint4*)&scores[token + j * THREADS * 8];
    };
    load_levels(first + threadIdx.x * 8, min_u32(end, first + BATCH));
    u32* histogram = p.histogram + (u64)score_row * (BINS + 1);
    Range range = range_of(p, row, kv_head, table_row, lane);
    float absolute = absolute_error(p, row, kv_head, table_row, lane);
    Found found = find_bins(p, histogram, counts, range, absolute, row.heavy);
    if (found.total <= row.heavy) {
        // Fewer compete than there is room for.
        if (blockIdx.x == 0 && threadIdx.x == 0) p.cuts[score_row] = CUT_ALL;
        return;
    }
    u32* candidates = p.candidates + (u64)score_row * CANDIDATES * 2;
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
#if COLLECT_FIRST
        Queue queue = {queues[threadIdx.x / 32], mine, &mine_count, MINE, 0};
#endif
        // All lanes of a warp take part, those past the end with nothing.
        for (u32 token = base + threadIdx.x * 8; token - lane * 8 < upto; token += THREADS * 8 * AT_ONCE) {
            if (token - lane * 8 >= first + THREADS * 8 * AT_ONCE) load_levels(token, upto);
#pragma unroll
            for (u32 j = 0; j < AT_ONCE; j++) {
                u32 at_token = token + j * THREADS * 8;
                u32 words[4] = {levels[j].x, levels[j].y, levels[j].z, levels[j].w};
#if COLLECT_FIRST
                u32 found_here = 0;
#endif
#pragma unroll
                for (u32 i = 0; i < 8; i++) {
                    u32 level = words[i / 2] >> (16 * (i % 2)) & 0xffffu;
                    bool candidate = level - low_level < high_level - low_level && at_token + i < upto;
#if DISJOINT
                    candidate = candidate && !in_base(p, row, at_token + i);
#endif
#if COLLECT_FIRST
                    found_here |= (candidate ? 1u : 0u) << i;
#else
                    if (!candidate) continue;
                    u32 at = atomicAdd(&mine_count, 1u);
                    if (at < MINE) mine[at] = at_token + i;
#endif
                }
#if COLLECT_FIRST
                for (; __any_sync(FULL_WARP, found_here); found_here &= found_here - 1)
                    queue.push(found_here != 0, at_token + __ffs((int)found_here) - 1);
#endif
            }
        }
#if COLLECT_FIRST
        queue.finish();
#endif
        __syncthreads();
        u32 count = mine_count;
        // By the warp that has the fewest candidates.
        if (threadIdx.x == THREADS - 1 && count > 0) place = atomicAdd(&histogram[BINS], count);
        if (count <= SHARED_BATCH) {
            for (u32 i = threadIdx.x / EXACT_PARTS; i - lane / EXACT_PARTS < count; i += THREADS / EXACT_PARTS) {
                u32 own = mine[min_u32(i, count - 1)];
                u32 key = order_key(exact_score_shared(p, tables, row.sequence, kv_head, own));
                if (i < count && lane % EXACT_PARTS == 0) mine_keys[i] = key;
            }
        } else if (count <= MINE) {
            for (u32 i = threadIdx.x; i < count; i += THREADS)
                mine_keys[i] = order_key(exact_score(p, tables, row.sequence, kv_head, mine[i]));
        }
        __syncthreads();
        // A row with more candidates than a list holds is searched whole.
        if (count <= MINE && count > 0 && place + count <= CANDIDATES) {
            for (u32 i = threadIdx.x; i < count; i += THREADS) *(uint2*)&candidates[(place + i) * 2] = uint2{mine_keys[i], mine[i]};
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
    Candidates all = {p, row, tables, scores, whole ? nullptr : candidates, kv_head, count, low_level, high_level};
    // A candidate's rank is its order key, from the least on, then its token: one number of 64 bits, the larger the better,
    // of which the first digits are those of `prefix`. Of `active` candidates with these `wanted` are selected.
    __shared__ u32 least, most, picked, picked_above, picked_count;
    u32 active = count, rounds = 0, base_key = 0, shift = 0;
    u64 prefix = 0;
    auto number_of = [&](u32 key, u32 token) { return ((u64)(key - base_key) << 32 | ~token) << shift; };
    auto digits_of = [&](u64 number) { return rounds == 0 ? 0 : number >> (64 - DIGIT_BITS * rounds); };
    if (active > RANKED) {
        if (threadIdx.x == 0) {
            least = ~0u;
            most = 0;
        }
        __syncthreads();
        u32 own_least = ~0u, own_most = 0;
        all.each([&](u32 key, u32, bool valid) {
            if (!valid) return;
            own_least = min_u32(own_least, key);
            own_most = max_u32(own_most, key);
        });
        own_least = __reduce_min_sync(FULL_WARP, own_least);
        own_most = __reduce_max_sync(FULL_WARP, own_most);
        if (lane == 0) {
            atomicMin(&least, own_least);
            atomicMax(&most, own_most);
        }
        __syncthreads();
        base_key = least;
        shift = __clz((int)(most - least));
    }
    // Five rounds leave nine bits of the token, or as many candidates as the list holds.
    while (active > RANKED && rounds < 5) {
        for (u32 i = threadIdx.x; i < BINS; i += THREADS) counts[i] = 0;
        __syncthreads();
        all.each([&](u32 key, u32 token, bool valid) {
            u64 number = number_of(key, token);
            if (valid && digits_of(number) == prefix) atomicAdd(&counts[(number >> (64 - DIGIT_BITS * (rounds + 1))) & (BINS - 1)], 1u);
        });
        __syncthreads();
        // From the highest bin down: each thread owns neighbouring bins.
        const u32 own = BINS / THREADS;
        u32 top = BINS - 1 - threadIdx.x * own, sum = 0, total;
        for (u32 i = 0; i < own; i++) sum += counts[top - i];
        u32 upto = block_scan<WARPS>(sum, total);
        if (upto >= wanted && upto - sum < wanted) {
            u32 above = upto - sum, bin = top;
            for (u32 i = 0; i < own; i++) {
                bin = top - i;
                if (above + counts[bin] >= wanted) break;
                above += counts[bin];
            }
            picked = bin;
            picked_above = above;
            picked_count = counts[bin];
        }
        __syncthreads();
        prefix = prefix << DIGIT_BITS | picked;
        wanted -= picked_above;
        active = picked_count;
        rounds++;
    }
    // What is left is compared each with each, two threads a candidate.
    __shared__ uint2 ranked[2 * RANKED];
    if (threadIdx.x == 0) place = 0;
    __syncthreads();
    all.each([&](u32 key, u32 token, bool valid) {
        u64 digits = digits_of(number_of(key, token));
        bool close = valid && digits == prefix;
        u32 mask = __ballot_sync(FULL_WARP, close), at = 0;
        if (mask != 0) {
            if (lane == 0) at = atomicAdd(&place, __popc(mask));
            at = __shfl_sync(FULL_WARP, at, 0);
        }
        if (close) ranked[at + __popc(mask & ((1u << lane) - 1u))] = uint2{key, token};
        else if (valid && digits > prefix) scores[token] = LEVEL_SELECTED;
    });
    __syncthreads();
    for (u32 first_ranked = 0; first_ranked < active; first_ranked += THREADS / 2) {
        u32 place_of = first_ranked + threadIdx.x / 2, before = 0;
        uint2 own = ranked[min_u32(place_of, active - 1)];
        for (u32 i = threadIdx.x % 2; i < active; i += 2) {
            uint2 other = ranked[i];
            before += other.x > own.x || (other.x == own.x && other.y < own.y) ? 1 : 0;
        }
        before += __shfl_xor_sync(FULL_WARP, before, 1);
        if (place_of < active && threadIdx.x % 2 == 0 && before < wanted) scores[own.y] = LEVEL_SELECTED;
    }
}
