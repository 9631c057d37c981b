#import params
#import place
#import rows
#import entries
#import runs
#import query
#import pieces
#ifdef SPARSE
#import scan
#endif
// As attend.wgsl, where a row of keys fits one subgroup: LANES neighbours own one piece of a row each, of keys and of
// values, take ROWS rows at a time, and keep the query and their part of the sums in registers. Until the end nobody
// waits for other subgroups.
//
// What a lane multiplies are VALUES = ROWS · SLOTS products, one per row and head, which the LANES lanes add up by
// halves: a lane gives away the half that is not its own, so that lane n ends with the logit of row n / SLOTS and head
// n % SLOTS. Softmax then runs once per logit.
@group(0) @binding(2) var<storage, read> k_pages: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> v_pages: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> entries: array<Entry>;
@group(0) @binding(5) var<storage, read> rows: array<Row>;
@group(0) @binding(6) var<storage, read_write> partials: array<f32>;
#ifdef SPARSE
@group(0) @binding(7) var<storage, read> scores: array<vec4<u32>>;
#endif

// Finite, for WGSL may assume that infinity does not occur; no real logit comes near.
const MASKED: f32 = -1e30;
const GROUPS: u32 = WIDTH / LANES;
const VALUES: u32 = ROWS * SLOTS;
// Spare words keep the channels of a lane in different banks.
const SUMS_ROW: u32 = WIDTH + 4u;
var<workgroup> shared_sums: array<f32, PIECE * SUMS_ROW>;
var<workgroup> states: array<vec2<f32>, GROUPS * SLOTS>;
#ifdef SPARSE
// Token in the chunk, and which heads chose it from bit 16 on.
var<workgroup> chosen: array<u32, CHUNK>;
#endif

// Whether a chunk is attended apart from the one before it in the list: runs are `max_count` chunks of a sequence, counted
// from its first, so that a result does not depend on what else is in the list.
fn starts_run(unit: u32) -> bool {
    if unit == 0u || p.max_count == 1u {
        return true;
    }
    let run_tokens = p.max_count * CHUNK;
    return sequence_of(unit) != sequence_of(unit - 1u) || first_token(unit) / run_tokens != first_token(unit - 1u) / run_tokens;
}

fn part_of(row: Row, head: u32, unit: u32) -> u32 {
    return (row.part_base + head * row.part_count + first_token(unit) / CHUNK) * PART_STRIDE;
}

#ifdef SPARSE
// Lists a chunk's chosen tokens, and gives how many there are.
fn choose(local: u32, row: Row, row_index: u32, kv_head: u32, first_head: u32, first: u32, in_chunk: u32) -> u32 {
    // Neighbouring tokens by the same invocation: one load for four.
    var own = 0u;
#repeat j QUADS
    let at$j = (local * QUADS + $ju) * 4u;
    var masks$j = vec4<u32>();
#end
#repeat j QUADS
    if at$j < in_chunk {
#repeat h SCORED
        {
            let head = min(first_head + $hu, GROUP - 1u);
            let score_head = kv_head * SCORE_ROWS + min(head, SCORE_ROWS - 1u);
            let score_row = (row_index - p.first_row) * (KV_HEADS * SCORE_ROWS) + score_head;
            let limits = scores[score_row / 2u];
            let threshold = select(limits.xy, limits.zw, (score_row & 1u) == 1u);
            let keys = scores[(p.header + row.score_base + score_head * score_stride(row.visible) + first + at$j) / 4u];
            let tokens = vec4<u32>(first + at$j) + vec4<u32>(0u, 1u, 2u, 3u);
            let above = keys > vec4<u32>(threshold.x);
            let last = (keys == vec4<u32>(threshold.x)) & (tokens <= vec4<u32>(threshold.y));
            // One selection may serve all heads of the tile.
            let heads = select(1u << $hu, (1u << HEADS) - 1u, SCORE_ROWS == 1u);
            masks$j |= select(vec4<u32>(), vec4<u32>(heads), above | last);
        }
#end
#repeat c 4
        if in_base(row, first + at$j + $cu) {
            masks$j[$c] = (1u << HEADS) - 1u;
        }
        if at$j + $cu >= in_chunk {
            masks$j[$c] = 0u;
        }
        own += select(0u, 1u, masks$j[$c] != 0u);
#end
    }
#end
    var filled = inclusive_scan(local, own) - own;
    let count = scan_total();
#repeat j QUADS
#repeat c 4
    if masks$j[$c] != 0u {
        chosen[filled] = (at$j + $cu) | (masks$j[$c] << 16u);
        filled++;
    }
#end
#end
    workgroupBarrier();
    return count;
}
#endif

// Attends chunks of one sequence, of which the first are the first to lie past its last key. The result is that of the
// first of them, and the others' are nothing.
fn attend_run(place: Place, local: u32, token_index: u32, tile_index: u32, kv_head: u32, run: u32, run_end: u32) {
    let sequence = sequence_of(run);
    let row_index = sequence * p.tq + token_index;
    let row = rows[row_index];
    let first_head = tile_index * HEADS;
    let lane = local % LANES;
    let row_group = local / LANES;
    let first_lane = place.in_subgroup - lane;
    if first_token(run) >= row.visible {
        return;
    }

    // What an earlier run left there has been read.
    workgroupBarrier();
    // The query by way of shared memory. Logits come out in units of log 2, so that exp2 undoes them.
    for (var i = local; i < HEADS * LANES * PIECE; i += WIDTH) {
        let head = first_head + i / (LANES * PIECE);
        let channel = i % (LANES * PIECE);
        var x = 0.0;
        if channel < HEAD_DIM && head < GROUP {
            x = query_element(sequence, token_index, kv_head * GROUP + head, channel)
                * (p.scale * 1.4426950408889634);
        }
        shared_sums[channel % PIECE * SUMS_ROW + i / (LANES * PIECE) * LANES + channel / PIECE] = x;
    }
    workgroupBarrier();
#repeat h HEADS
#repeat q HALVES
    let query$h_$q = vec4<f32>(
        shared_sums[($qu * 4u) * SUMS_ROW + $hu * LANES + lane],
        shared_sums[($qu * 4u + 1u) * SUMS_ROW + $hu * LANES + lane],
        shared_sums[($qu * 4u + 2u) * SUMS_ROW + $hu * LANES + lane],
        shared_sums[($qu * 4u + 3u) * SUMS_ROW + $hu * LANES + lane]);
    var value$h_$q = vec4<f32>();
#end
#end
    let k_piece = min(lane, K_PIECES - 1u);
    let v_piece = min(lane, V_PIECES - 1u);
    let my_row = lane % VALUES / SLOTS;
    let my_head = lane % SLOTS;
    var peak = MASKED;
    var sum = 0.0;
    var unit = run;
    for (; unit < run_end; unit++) {
        let first = first_token(unit);
        if first >= row.visible {
            break;
        }
        let in_chunk = min(CHUNK, row.visible - first);
        let kv_row = (entries[p.first_entry + unit / UNITS].page * KV_HEADS + kv_head) * PAGE + unit % UNITS * CHUNK;
#ifdef SPARSE
        let count = choose(local, row, row_index, kv_head, first_head, first, in_chunk);
#else
        let count = in_chunk;
#endif
        // The rounds are the same for all, so that lanes meet in them.
        for (var base = 0u; base < count; base += GROUPS * ROWS) {
            let group_base = base + row_group * ROWS;
            // All loads first. Rows past the end are read again and weigh nothing.
#repeat r ROWS
#ifdef SPARSE
            let token$r = chosen[min(group_base + $ru, count - 1u)] & 0xffffu;
#else
            let token$r = min(group_base + $ru, count - 1u);
#endif
            let keys$r = k_pages[(kv_row + token$r) * K_PIECES + k_piece];
#end
#repeat r ROWS
            let values$r = v_pages[(kv_row + token$r) * V_PIECES + v_piece];
#end
            var products: array<f32, VALUES>;
#repeat r ROWS
            {
                let a = piece_low(keys$r);
#ifndef KV_F32
                let b = piece_high(keys$r);
#endif
#repeat h HEADS
#ifdef KV_F32
                products[$ru * SLOTS + $hu] = dot(a, query$h_0);
#else
                products[$ru * SLOTS + $hu] = dot(a, query$h_0) + dot(b, query$h_1);
#endif
#end
            }
#end
#repeat s FOLD_16
            products[$su] = select(products[$su], products[$su + 16u], (lane & 16u) != 0u)
                + subgroupShuffleXor(select(products[$su + 16u], products[$su], (lane & 16u) != 0u), 16u);
#end
#repeat s FOLD_8
            products[$su] = select(products[$su], products[$su + 8u], (lane & 8u) != 0u)
                + subgroupShuffleXor(select(products[$su + 8u], products[$su], (lane & 8u) != 0u), 8u);
#end
#repeat s FOLD_4
            products[$su] = select(products[$su], products[$su + 4u], (lane & 4u) != 0u)
                + subgroupShuffleXor(select(products[$su + 4u], products[$su], (lane & 4u) != 0u), 4u);
#end
#repeat s FOLD_2
            products[$su] = select(products[$su], products[$su + 2u], (lane & 2u) != 0u)
                + subgroupShuffleXor(select(products[$su + 2u], products[$su], (lane & 2u) != 0u), 2u);
#end
#repeat s FOLD_1
            products[$su] = select(products[$su], products[$su + 1u], (lane & 1u) != 0u)
                + subgroupShuffleXor(select(products[$su + 1u], products[$su], (lane & 1u) != 0u), 1u);
#end
            // Lanes beyond the values hold parts of the same sums.
            var logit = products[0];
#repeat s ADDED
            logit += subgroupShuffleXor(logit, VALUES << $su);
#end
            let slot = group_base + my_row;
            var seen = slot < count && my_head < HEADS;
#ifdef SPARSE
            seen = seen && ((chosen[min(slot, count - 1u)] >> (16u + my_head)) & 1u) == 1u;
#endif
            logit = select(MASKED, logit, seen);
            var top = max(peak, logit);
#repeat s ROW_BITS
            top = max(top, subgroupShuffleXor(top, SLOTS << $su));
#end
            // Peaks seldom grow after the first rounds.
            if subgroupAny(top > peak) {
                let keep = exp2(peak - top);
                peak = top;
                sum *= keep;
#repeat h HEADS
                let keep$h = subgroupShuffle(keep, first_lane + $hu);
#repeat q HALVES
                value$h_$q *= keep$h;
#end
#end
            }
            let weight = select(exp2(logit - peak), 0.0, logit <= MASKED);
            sum += weight;
#repeat r ROWS
            {
                let a = piece_low(values$r);
#ifndef KV_F32
                let b = piece_high(values$r);
#endif
#repeat h HEADS
                let weight$h = subgroupShuffle(weight, first_lane + $ru * SLOTS + $hu);
                value$h_0 += weight$h * a;
#ifndef KV_F32
                value$h_1 += weight$h * b;
#endif
#end
            }
#end
        }
    }
#repeat s ROW_BITS
    sum += subgroupShuffleXor(sum, SLOTS << $su);
#end

    // Chunks after the first have nothing of their own.
    for (var i = local; i < (unit - run - 1u) * HEADS; i += WIDTH) {
        let head = first_head + i % HEADS;
        if head < GROUP {
            partials[part_of(row, kv_head * GROUP + head, run + 1u + i / HEADS)] = MASKED;
        }
    }
    // The groups of rows merge by their peaks.
    if lane < SLOTS {
        states[row_group * SLOTS + lane] = vec2<f32>(peak, sum);
    }
    workgroupBarrier();
    var top = MASKED;
    for (var g = 0u; g < GROUPS; g++) {
        top = max(top, states[g * SLOTS + my_head].x);
    }
    var total = 0.0;
    for (var g = 0u; g < GROUPS; g++) {
        let state = states[g * SLOTS + my_head];
        total += state.y * exp2(state.x - top);
    }
    let factor = exp2(peak - top);
#repeat h HEADS
    let head$h = first_head + $hu;
    let part$h = part_of(row, kv_head * GROUP + min(head$h, GROUP - 1u), run);
    let factor$h = subgroupShuffle(factor, first_lane + $hu);
    if local == $hu && head$h < GROUP {
        partials[part$h] = top;
        partials[part$h + 1u] = total;
    }
    workgroupBarrier();
#repeat q HALVES
#repeat c 4
    shared_sums[($qu * 4u + $cu) * SUMS_ROW + local] = value$h_$q[$c] * factor$h;
#end
#end
    workgroupBarrier();
    for (var channel = local; channel < V_PIECES * PIECE; channel += WIDTH) {
        var value = 0.0;
        for (var g = 0u; g < GROUPS; g++) {
            value += shared_sums[channel % PIECE * SUMS_ROW + g * LANES + channel / PIECE];
        }
        if head$h < GROUP {
            partials[part$h + 4u + channel] = value;
        }
    }
#end
}

@compute @workgroup_size(WIDTH)
fn main(place: Place) {
    let local = local_of(place);
    let index = group_index(place.group);
    if index >= p.groups {
        return;
    }
    let token_index = p.first_token + index % p.tokens;
    let tile_index = index / p.tokens % HEAD_TILES;
    let kv_head = index / (p.tokens * HEAD_TILES) % KV_HEADS;
    let first_unit = index / (p.tokens * HEAD_TILES * KV_HEADS) * p.max_count;
    let units = p.entries * UNITS;
    // The runs that start among `max_count` chunks of the list of pages.
    for (var run = first_unit; run < min(first_unit + p.max_count, units); run++) {
        if !starts_run(run) {
            continue;
        }
        var run_end = run + 1u;
        while run_end < units && !starts_run(run_end) {
            run_end++;
        }
        attend_run(place, local, token_index, tile_index, kv_head, run, run_end);
    }
}
