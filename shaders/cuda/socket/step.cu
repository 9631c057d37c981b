// A whole decode step in one kernel, from the query to the output: one cluster of blocks per (kv head, row), which share
// the tokens in short runs, so that all have as many chosen ones to attend to. Levels never leave shared memory; the blocks tell each other counts, candidates and partial results.
//
// Query hash, score, histogram of the row's levels, candidates near the threshold scored again exactly, the best of them,
// attention over the chosen keys, merge: what the kernels of their own do, in the same arithmetic.
#define WARPS 8
#define THREADS (WARPS * 32)
#include "cluster.cuh"
#include "query.cuh"
#include "score_keys.cuh"
#include "runs.cuh"
#include "tiles.cuh"
#include "merge_cluster.cuh"

#if __CUDA_ARCH__ >= 900

// Query blocks of a block.
#define QUERY_EACH ((QUERY_BLOCKS + CLUSTER - 1) / CLUSTER)
// Candidates that a block lists for a row; where it has more, it scores them again whenever they are wanted.
#define MINE 1024
// Keys of a row that a cluster scores beforehand, where there is no room for all levels; and what is chosen of them
// beyond its share, in standard deviations.
#define SAMPLE 16384
#define SURPLUS 5.0f
// Candidates of a row that are compared each with each; more are told apart by their digits first.
#define RANKED 512
#define DIGIT_BITS 11
// Chosen keys that the list holds; a span may have more, one list after the other.
#define CHOSEN 4096
// Survivors of a row that a block lists.
#define SURVIVORS p.width
// Padding, so that the rows' levels start in different banks.
#define LEVEL_STRIDE(span) ((span) + 32)


extern __shared__ __align__(256) u8 memory[];

// Shared memory by use: what lasts, then first what selection needs, later the tiles of the attention.
struct Layout {
    u32* bits;
    u32* chosen;
    u32* counts;
    u8* lookup;
    uint2* mine;
    uint2* ranked;
    u32* maybe;
    u16* levels;
    u32* survivors;
    u8* tiles;

    __device__ __forceinline__ Layout(u32 span, u32 room) {
        bits = (u32*)memory;
        tiles = memory + (SCORE_ROWS * (span / 8) + 255) / 256 * 256;
        chosen = (u32*)(tiles + WARPS * STAGES * STAGE);
        counts = (u32*)tiles;
        lookup = (u8*)(counts + SCORE_ROWS * BINS);
        mine = (uint2*)(lookup + LOOKUP_BYTES);
        maybe = (u32*)(mine + SCORE_ROWS * MINE);
        levels = (u16*)(maybe + SCORE_ROWS * (span / 32));
        // Once the candidates are known, levels are not.
        ranked = (uint2*)levels;
        survivors = (u32*)(levels + SCORE_ROWS * room);
    }
};

#if SAMPLED
// What a scan does with the keys: some are counted; all are; those from a floor on are counted and listed; what becomes
// of each is known. After TRY and SURVIVE there is no need of COUNT and MARK, unless the few deceived.
#define TRY 0
#define COUNT 1
#define SURVIVE 2
#define MARK 3
#endif

struct Put {
    const Call& p;
    const Row& row;
    const Layout& at;
    u32 stride, rank, end;
    // Per row, all in shared memory: levels from which on keys are candidates, are selected; candidates and keys above.
    const u32* lows;
    const u32* highs;
    uint4* told;
#if SAMPLED
    u32 mode;
    // Levels from which on keys survive, and how many do.
    const u32* floors;
    u32* surviving;
#endif

    __device__ __forceinline__ bool contested(u32 token) const {
#if DISJOINT
        return !in_base(p, row, token_of(token, rank));
#else
        return true;
#endif
    }
    __device__ __forceinline__ void count(u32 head, u32 level) const { atomicAdd(&at.counts[head * BINS + (level >> BIN_SHIFT)], 1u); }
    __device__ __forceinline__ void select(u32 head, u32 place) const { atomicOr(&at.bits[head * (p.span / 32) + place / 32], 1u << place % 32); }
    __device__ __forceinline__ void add_candidate(u32 head, u32 place) const {
        atomicOr(&at.maybe[head * (p.span / 32) + place / 32], 1u << place % 32);
        u32 listed = atomicAdd(&told[head].x, 1u);
        if (listed < MINE) at.mine[head * MINE + listed].y = token_of(place, rank);
    }
#if SAMPLED
    __device__ __forceinline__ void take(u32 head, u32 token, u32 level) const {
        if (mode != TRY && !contested(token)) return;
        if (mode != MARK) {
            count(head, level);
            if (mode != SURVIVE) return;
            u32 listed = atomicAdd(&surviving[head], 1u);
            if (listed >= SURVIVORS) return;
            at.survivors[head * SURVIVORS + listed] = token;
            at.levels[head * SURVIVORS + listed] = (u16)level;
        } else if (level >= highs[head]) {
            select(head, token);
            atomicAdd(&told[head].y, 1u);
        } else {
            add_candidate(head, token);
        }
    }
    __device__ __forceinline__ void operator()(u32 head, u32 token, u32 level) const {
        if (level >= floors[head]) take(head, token, level);
    }
    // Of four neighbouring tokens.
    __device__ __forceinline__ void operator()(u32 head, u32 token, const u32 (&level)[4]) const {
        u32 floor = floors[head];
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (level[i] >= floor && token + i < end) take(head, token + i, level[i]);
    }
#else
    __device__ __forceinline__ void operator()(u32 head, u32 token, u32 level) const {
        at.levels[head * stride + token] = (u16)level;
        if (contested(token)) count(head, level);
    }
    __device__ __forceinline__ void operator()(u32 head, u32 token, const u32 (&level)[4]) const {
        if (token < end)
            *(uint2*)&at.levels[head * stride + token] = uint2{level[0] | level[1] << 16, level[2] | level[3] << 16};
#pragma unroll
        for (u32 i = 0; i < 4; i++)
            if (token + i < end && contested(token + i)) count(head, level[i]);
    }
#endif
};

// Where the `wanted`-th largest of a row is, by counts of bins; what all blocks are told.
struct Found {
    u32 bin, above, in_bin, total;
};

// Adds up a row's counts over the cluster and finds the bin; by all threads of one block.
__device__ void find_bin(const u32* counts, u32 wanted, Found& found) {
    const u32 own = BINS / THREADS;
    u32 top = BINS - own * (threadIdx.x + 1);
    u32 sums[own] = {};
#pragma unroll 4
    for (u32 rank = 0; rank < CLUSTER; rank++)
#pragma unroll
        for (u32 i = 0; i < own; i += 4) {
            uint4 part = remote_uint4(counts + top + i, rank);
            sums[i] += part.x;
            sums[i + 1] += part.y;
            sums[i + 2] += part.z;
            sums[i + 3] += part.w;
        }
    u32 sum = 0, total;
#pragma unroll
    for (u32 i = 0; i < own; i++) sum += sums[i];
    u32 upto = block_scan<WARPS>(sum, total);
    if (threadIdx.x == 0) found.total = total;
    if (upto >= wanted && upto - sum < wanted) {
        u32 above = upto - sum;
        bool done = false;
#pragma unroll
        for (u32 i = own; i-- > 0;) {
            if (done) continue;
            if (above + sums[i] >= wanted) {
                found.bin = top + i;
                found.above = above;
                found.in_bin = sums[i];
                done = true;
            }
            above += sums[i];
        }
    }
}

// What is left to choose in a row. A candidate's rank is its order key, from the least of the row on, then its token: one
// number of 64 bits, the larger the better, of which `rounds` digits are those of `prefix`.
struct Choice {
    u64 prefix;
    u32 least, shift, rounds;
    // Of `active` candidates with these digits, `wanted` are selected.
    u32 active, wanted;
    // Of this block's own.
    u32 listed;

    __device__ __forceinline__ u64 number(u32 key, u32 token) const { return ((u64)(key - least) << 32 | ~token) << shift; }
    __device__ __forceinline__ u64 digits(u64 number) const { return rounds == 0 ? 0 : number >> (64 - DIGIT_BITS * rounds); }
};

// Error of stored sums in units of the largest gain, beside the relative one; by a whole warp.
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

#ifdef STAMPS
#define STAMP(i) \
    if (threadIdx.x == 0) ((u32*)p.values)[(blockIdx.y * CLUSTER + blockIdx.x) * 16 + i] = (u32)clock64()
#else
#define STAMP(i)
#endif

extern "C" __global__ void __launch_bounds__(THREADS, 1) step(ARGUMENTS) {
    CALL;
    __shared__ Found found[SCORE_ROWS];
    // Of this block per row: candidates, keys above them, least and largest order key.
    __shared__ uint4 told[SCORE_ROWS];
    __shared__ u32 candidates_of[SCORE_ROWS][CLUSTER];
    // Levels from which on keys are candidates, and from which on they are selected.
    __shared__ u32 lows[SCORE_ROWS], highs[SCORE_ROWS];
    __shared__ Choice choices[SCORE_ROWS];
#if SAMPLED
    __shared__ u32 floors[SCORE_ROWS], surviving[SCORE_ROWS];
    __shared__ u32 failed;
#endif
    u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    u32 rank = blockIdx.x, kv_head = blockIdx.y, block_row = blockIdx.z;
    u32 row_index = p.first_row + block_row;
    Row row = p.rows[row_index];
    u64 table_row = (u64)(block_row * KV_HEADS + kv_head) * SCORING_HEADS;
    // Tokens are numbered within the block.
    u32 count = tokens_of(row.visible, rank);
    Layout at(p.span, p.width);
    u32 stride = LEVEL_STRIDE(p.span);
    bool scored = row.heavy > 0 && row.heavy < row.visible;
    STAMP(0);
    float w[QUERY_EACH][WARP_CHANNELS];
#pragma unroll
    for (u32 i = 0; i < QUERY_EACH; i++)
        if (rank + i * CLUSTER < QUERY_BLOCKS) load_planes(p, rank + i * CLUSTER, kv_head, w[i]);
    wait_for_earlier();
    let_later_start();
    for (u32 i = threadIdx.x; i < SCORE_ROWS * (p.span / 32); i += THREADS) at.bits[i] = scored || row.heavy == 0 ? 0 : ~0u;
    auto clear_counts = [&]() {
        for (u32 i = threadIdx.x; i < SCORE_ROWS * BINS; i += THREADS) at.counts[i] = 0;
    };
    if (scored) {
        clear_counts();
        for (u32 i = threadIdx.x; i < SCORE_ROWS * (p.span / 32); i += THREADS) at.maybe[i] = 0;
#pragma unroll
        for (u32 i = 0; i < QUERY_EACH; i++)
            if (rank + i * CLUSTER < QUERY_BLOCKS) hash_tables(p, rank + i * CLUSTER, kv_head, block_row, w[i]);
        STAMP(1);
        cluster_barrier();
        STAMP(2);
        Put put = {p, row, at, stride, rank, count, lows, highs, told};
        auto index_of = [&](u32 token) { return index_word(page_of(p, row.sequence, token), kv_head, 0, token); };
        auto index = [&](u32 place) { return index_of(token_of(place, rank)); };
#if FAST == 2
        __shared__ Scales scales[HEAD_BLOCKS * 4];
        fill_lookup(p, table_row, at.lookup, scales);
#elif FAST == 3
        fill_lookup(p, table_row, at.lookup);
#endif
        auto scan = [&](u32 places, auto index_at) {
            for (u32 block = 0; block < (SCORING_HEADS + HEADS_TOGETHER - 1) / HEADS_TOGETHER; block++) {
#if FAST == 1
                __syncthreads();
                fill_lookup(p, table_row, block, at.lookup);
#endif
                __syncthreads();
#if FAST == 2
                score_keys<4>(p, row, kv_head, table_row, block, 0, places, at.lookup, scales, index_at, put);
#else
                score_keys<true>(p, row, kv_head, table_row, block, 0, places, at.lookup, index_at, put);
#endif
            }
        };
        // Finds the bins of all rows' thresholds, and from them which levels are of interest.
        auto find_bins = [&](auto wanted_of) {
            cluster_barrier();
            STAMP(4);
            for (u32 h = 0; h < SCORE_ROWS; h++)
                if (h % CLUSTER == rank) find_bin(at.counts + h * BINS, wanted_of(h), found[h]);
            STAMP(5);
            cluster_barrier();
            for (u32 h = warp; h < SCORE_ROWS; h += WARPS) {
                uint4 of_row = remote_uint4(&found[h], h % CLUSTER);
                Range range = range_of(p, row, kv_head, table_row + h, lane);
                float absolute = absolute_error(p, row, kv_head, table_row + h, lane);
                u32 lowest = of_row.x << BIN_SHIFT, highest = lowest + (1u << BIN_SHIFT) - 1;
                u32 margin = max_u32(margin_of(lowest, range, absolute), margin_of(highest, range, absolute));
                bool all = of_row.w < wanted_of(h) || of_row.w == 0;
                if (lane == 0) {
                    lows[h] = all ? 0 : lowest > margin ? lowest - margin : 0;
                    highs[h] = all ? 0 : highest + margin + 1;
                    told[h] = uint4{0, 0, ~0u, 0};
                }
            }
            __syncthreads();
            STAMP(6);
        };
        auto heavy = [&](u32) { return row.heavy; };
#if SAMPLED
        // Runs of 32 keys from here and there say from where on a key may be selected.
        const u32 sample = SAMPLE / CLUSTER, groups = count / 32;
        put.mode = TRY;
        put.floors = floors;
        put.surviving = surviving;
        if (threadIdx.x < SCORE_ROWS) floors[threadIdx.x] = surviving[threadIdx.x] = 0;
        if (threadIdx.x == 0) failed = 0;
        put.end = sample;
        scan(sample, [&](u32 place) { return index((place / 32 + 1) * 2654435761u % groups * 32 + place % 32); });
        put.end = count;
        find_bins([&](u32) {
            float share = (float)row.heavy / (float)row.visible * (float)SAMPLE;
            return min_u32((u32)(share + SURPLUS * sqrtf(share)) + 8, SAMPLE);
        });
        if (threadIdx.x < SCORE_ROWS) floors[threadIdx.x] = lows[threadIdx.x] >> BIN_SHIFT << BIN_SHIFT;
        clear_counts();
        put.mode = SURVIVE;
        __syncthreads();
        scan(count, index);
        STAMP(3);
        find_bins(heavy);
        // The row's candidates must have survived, and all that did be listed.
        for (u32 i = threadIdx.x; i < SCORE_ROWS * CLUSTER; i += THREADS) {
            u32 h = i / CLUSTER;
            if (remote_u32(&surviving[h], i % CLUSTER) > SURVIVORS || lows[h] < floors[h]) failed = 1;
        }
        __syncthreads();
        if (failed) {
            cluster_barrier();
            clear_counts();
            if (threadIdx.x < SCORE_ROWS) floors[threadIdx.x] = 0;
            put.mode = COUNT;
            __syncthreads();
            scan(count, index);
            find_bins(heavy);
            if (threadIdx.x < SCORE_ROWS) floors[threadIdx.x] = lows[threadIdx.x];
            put.mode = MARK;
            __syncthreads();
            scan(count, index);
        } else {
#pragma unroll 1
            for (u32 h = 0; h < SCORE_ROWS; h++)
                for (u32 i = threadIdx.x; i < surviving[h]; i += THREADS) {
                    u32 level = at.levels[h * SURVIVORS + i], place = at.survivors[h * SURVIVORS + i];
                    if (level >= highs[h]) {
                        put.select(h, place);
                        atomicAdd(&told[h].y, 1u);
                    } else if (level >= lows[h]) {
                        put.add_candidate(h, place);
                    }
                }
        }
        __syncthreads();
#else
        scan(count, index);
        STAMP(3);
        find_bins(heavy);
#pragma unroll 1
        for (u32 h = 0; h < SCORE_ROWS; h++) {
            u32 low = lows[h], high = highs[h], above = 0;
            for (u32 i = threadIdx.x * 8; i < count; i += THREADS * 8) {
                uint4 eight = *(const uint4*)&at.levels[h * stride + i];
                u32 words[4] = {eight.x, eight.y, eight.z, eight.w}, byte = 0;
#pragma unroll
                for (u32 j = 0; j < 8; j++) {
                    u32 level = words[j / 2] >> (16 * (j % 2)) & 0xffffu;
                    if (level < low || i + j >= count || !put.contested(i + j)) continue;
                    if (level >= high) {
                        byte |= 1u << j;
                        above++;
                    } else {
                        put.add_candidate(h, i + j);
                    }
                }
                ((u8*)at.bits)[h * (p.span / 8) + i / 8] = (u8)byte;
            }
            above = __reduce_add_sync(FULL_WARP, above);
            if (lane == 0 && above > 0) atomicAdd(&told[h].y, above);
        }
        __syncthreads();
#endif
        STAMP(7);
#pragma unroll 1
        for (u32 h = 0; h < SCORE_ROWS; h++) {
            u32 listed = min_u32(told[h].x, MINE);
            const float* tables = p.tables + (table_row + h) * TABLE_ROW;
            for (u32 base = warp * 4; base < listed; base += WARPS * 4) {
                u32 place = base + lane / 8;
                u32 token = at.mine[h * MINE + min_u32(place, listed - 1)].y;
                u32 key = order_key(exact_score_shared(index_of(token), tables, lane));
                if (place < listed && lane % 8 == 0) {
                    at.mine[h * MINE + place].x = key;
                    atomicMin(&told[h].z, key);
                    atomicMax(&told[h].w, key);
                }
            }
        }
        STAMP(8);
        cluster_barrier();
        STAMP(9);
        for (u32 h = warp; h < SCORE_ROWS; h += WARPS) {
            uint4 of_block = uint4{0, 0, ~0u, 0};
            if (lane < CLUSTER) {
                of_block = remote_uint4(&told[h], lane);
                candidates_of[h][lane] = of_block.x;
            }
            u32 total = __reduce_add_sync(FULL_WARP, of_block.x), above = __reduce_add_sync(FULL_WARP, of_block.y);
            u32 least = __reduce_min_sync(FULL_WARP, of_block.z), most = __reduce_max_sync(FULL_WARP, of_block.w);
            u32 listed = told[h].x;
            if (lane == 0)
                choices[h] = Choice{0, least, (u32)__clz((int)(most - least)), 0, total, row.heavy - above, listed};
        }
        __syncthreads();
        auto is_refined = [&](u32 h) { return choices[h].rounds > 0; };
        auto each_candidate = [&](u32 h, auto use) {
            u32 listed = choices[h].listed;
            if (listed <= MINE) {
                for (u32 i = threadIdx.x; i < listed; i += THREADS) use(at.mine[h * MINE + i].x, at.mine[h * MINE + i].y);
                return;
            }
            for (u32 i = threadIdx.x; i < count; i += THREADS) {
                if (!(at.maybe[h * (p.span / 32) + i / 32] >> i % 32 & 1u)) continue;
                const float* tables = p.tables + (table_row + h) * TABLE_ROW;
                u32 token = token_of(i, rank);
                use(order_key(exact_score(p, tables, row.sequence, kv_head, token)), token);
            }
        };
        auto select = [&](u32 h, u32 token) { put.select(h, place_of(token)); };
        bool refined = false;
        while (true) {
            bool many = false;
            for (u32 h = 0; h < SCORE_ROWS; h++) many = many || choices[h].active > RANKED;
            if (!many) break;
            refined = true;
            for (u32 h = 0; h < SCORE_ROWS; h++)
                for (u32 i = threadIdx.x; choices[h].active > RANKED && i < BINS; i += THREADS) at.counts[h * BINS + i] = 0;
            __syncthreads();
            for (u32 h = 0; h < SCORE_ROWS; h++) {
                Choice choice = choices[h];
                if (choice.active <= RANKED) continue;
                each_candidate(h, [&](u32 key, u32 token) {
                    u64 number = choice.number(key, token);
                    u32 digit = (u32)(number >> (64 - DIGIT_BITS * (choice.rounds + 1))) & (BINS - 1);
                    if (choice.digits(number) == choice.prefix) atomicAdd(&at.counts[h * BINS + digit], 1u);
                });
            }
            cluster_barrier();
            for (u32 h = 0; h < SCORE_ROWS; h++)
                if (h % CLUSTER == rank && choices[h].active > RANKED) find_bin(at.counts + h * BINS, choices[h].wanted, found[h]);
            cluster_barrier();
            for (u32 h = warp; h < SCORE_ROWS; h += WARPS) {
                uint4 of_row = remote_uint4(&found[h], h % CLUSTER);
                __syncwarp();
                if (lane == 0 && choices[h].active > RANKED) {
                    choices[h].prefix = choices[h].prefix << DIGIT_BITS | of_row.x;
                    choices[h].rounds++;
                    choices[h].wanted -= of_row.y;
                    choices[h].active = of_row.z;
                }
            }
            __syncthreads();
        }
        if (refined) {
            // The blocks' candidates that are left are listed where the counts were.
            for (u32 h = threadIdx.x; h < SCORE_ROWS; h += THREADS)
                if (is_refined(h)) told[h].x = 0;
            __syncthreads();
            for (u32 h = 0; h < SCORE_ROWS; h++) {
                Choice choice = choices[h];
                if (choice.rounds == 0) continue;
                each_candidate(h, [&](u32 key, u32 token) {
                    u64 digits = choice.digits(choice.number(key, token));
                    if (digits > choice.prefix) select(h, token);
                    if (digits == choice.prefix) ((uint2*)(at.counts + h * BINS))[atomicAdd(&told[h].x, 1u)] = uint2{key, token};
                });
            }
            cluster_barrier();
            for (u32 i = threadIdx.x; i < SCORE_ROWS * CLUSTER; i += THREADS)
                if (is_refined(i / CLUSTER)) candidates_of[i / CLUSTER][i % CLUSTER] = remote_u32(&told[i / CLUSTER].x, i % CLUSTER);
            __syncthreads();
        }
        // The lists of all blocks, one after the other.
        auto list_of = [&](u32 h) { return is_refined(h) ? (uint2*)(at.counts + h * BINS) : at.mine + h * MINE; };
        for (u32 i = warp; i < SCORE_ROWS * CLUSTER; i += WARPS) {
            u32 h = i / CLUSTER, from = i % CLUSTER, length = candidates_of[h][from];
            u32 before = __reduce_add_sync(FULL_WARP, lane < from ? candidates_of[h][lane] : 0);
            for (u32 j = lane; j < length; j += 32) at.ranked[h * RANKED + before + j] = remote_uint2(list_of(h) + j, from);
        }
        __syncthreads();
#pragma unroll 1
        for (u32 h = 0; h < SCORE_ROWS; h++) {
            u32 all = choices[h].active;
            for (u32 i = warp; i < told[h].x; i += WARPS) {
                uint2 own = list_of(h)[i];
                u32 before = 0;
                for (u32 j = lane; j < all; j += 32) {
                    uint2 other = at.ranked[h * RANKED + j];
                    before += other.x > own.x || (other.x == own.x && other.y < own.y) ? 1 : 0;
                }
                before = __reduce_add_sync(FULL_WARP, before);
                if (lane == 0 && before < choices[h].wanted) select(h, own.y);
            }
        }
        STAMP(10);
        // Nobody reads the others' lists any more.
        cluster_barrier();
    } else {
        __syncthreads();
    }
#ifdef DUMP
    for (u32 i = threadIdx.x; i < SCORE_ROWS * (p.span / 32); i += THREADS) {
        u32 h = i / (p.span / 32), j = i % (p.span / 32);
        p.indices[((u64)kv_head * SCORE_ROWS + h) * (p.span / 32 * CLUSTER) + rank * (p.span / 32) + j] = (int)at.bits[i];
    }
#endif

    Tiles work;
    Work& keys = work.w;
    keys.p = &p;
    keys.sequence = row.sequence;
    keys.kv_head = kv_head;
    keys.rank = rank;
    keys.chosen = at.chosen;
    work.lane = lane;
    work.warp = warp;
    work.stages = shared_address(at.tiles) + warp * (STAGES * STAGE);
    work.stage = 0;
#if HEAD_DIM % 16 != 0 || VALUE_DIM % 16 != 0
    for (u32 i = threadIdx.x; i < WARPS * STAGES * STAGE / 16; i += THREADS) ((uint4*)at.tiles)[i] = uint4{0, 0, 0, 0};
#endif
    work.load_query(row_index, 0, HEADS);
    STAMP(11);
    u32 scanned = 0;
    do {
        // In 16 bits.
        keys.start = scanned;
        keys.count = 0;
        __syncthreads();
        while (scanned < count && keys.count + THREADS * 8 <= CHOSEN && scanned - keys.start + THREADS * 8 <= 65536) {
            u32 token = scanned + threadIdx.x * 8;
            u32 bytes[SCORE_ROWS];
#pragma unroll
            for (u32 h = 0; h < SCORE_ROWS; h++) bytes[h] = token < count ? ((const u8*)at.bits)[h * (p.span / 8) + token / 8] : 0;
            u32 masks[8], own = 0, total;
#pragma unroll
            for (u32 i = 0; i < 8; i++) {
                u32 mask = 0;
#pragma unroll
                for (u32 h = 0; h < SCORE_ROWS; h++)
                    if (bytes[h] >> i & 1u) mask |= SCORE_ROWS == 1 ? (1u << HEADS) - 1u : 1u << h;
                if (in_base(p, row, token_of(token + i, rank))) mask = (1u << HEADS) - 1u;
                if (token + i >= count) mask = 0;
                masks[i] = mask;
                own += mask != 0 ? 1 : 0;
            }
            u32 place = keys.count + block_scan<WARPS>(own, total) - own;
#pragma unroll
            for (u32 i = 0; i < 8; i++)
                if (masks[i] != 0) at.chosen[place++] = (token + i - keys.start) | masks[i] << 16;
            keys.count += total;
            scanned += THREADS * 8;
        }
        __syncthreads();
        STAMP(12);
        u32 tiles = (keys.count + TILE - 1) / TILE;
        work.start(tiles);
        work.run(tiles);
        __syncthreads();
    } while (scanned < count);
    STAMP(13);

    merge_cluster(work, row_index, kv_head, rank, (float*)at.tiles);
    STAMP(14);
    STAMP(15);
}
#else
// Only GPUs with clusters are asked for it.
extern "C" __global__ void step(ARGUMENTS) {}
#endif
