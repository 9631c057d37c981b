#import params
#import place
#import rows
#import entries
#import query
#import pieces
#ifdef SPARSE
#import scan
#endif
// Attention of the query heads of one kv head over the chosen keys of one chunk of a page, or over all of them: one
// workgroup per (page entry, chunk, kv head, tile of heads, query token), one partial result each.
//
// A key row is read once for all heads of the tile: four invocations share a row in the logits' product, and in the
// values' sum one invocation owns one 16-byte piece of the value rows of every ROW_GROUPS-th key.
@group(0) @binding(2) var<storage, read> k_pages: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> v_pages: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> entries: array<Entry>;
@group(0) @binding(5) var<storage, read> rows: array<Row>;
@group(0) @binding(6) var<storage, read_write> partials: array<f32>;
#ifdef SPARSE
@group(0) @binding(7) var<storage, read> scores: array<u32>;
#endif

// Finite, for WGSL may assume that infinity does not occur; no real logit comes near.
const MASKED: f32 = -1e30;
const HALVES: u32 = PIECE / 4u;
const QUERY_VECS: u32 = K_STEPS * 4u * HALVES;
var<workgroup> queries: array<vec4<f32>, HEADS * QUERY_VECS>;
var<workgroup> logits: array<f32, HEADS * TILE>;
var<workgroup> scratch: array<vec4<f32>, 256>;
#ifdef SPARSE
// Token in the chunk, and which heads chose it from bit 16 on.
var<workgroup> chosen: array<u32, CHUNK>;
var<workgroup> chosen_total: u32;
#endif

// Adds up four channels over the groups of rows, in order.
fn merge_groups(local: u32, value: vec4<f32>, store: bool, at: u32) {
    workgroupBarrier();
    scratch[local] = value;
    workgroupBarrier();
    if local < V_PIECES && store {
        var total = vec4<f32>();
        for (var g = 0u; g < ROW_GROUPS; g++) {
            total += scratch[g * V_PIECES + local];
        }
        partials[at] = total.x;
        partials[at + 1u] = total.y;
        partials[at + 2u] = total.z;
        partials[at + 3u] = total.w;
    }
}

@compute @workgroup_size(256)
fn main(place: Place) {
    let local = local_of(place);
    let index = group_index(place.group);
    if index >= p.groups {
        return;
    }
    let token_index = p.first_token + index % p.tokens;
    let tile_index = index / p.tokens % HEAD_TILES;
    let kv_head = index / (p.tokens * HEAD_TILES) % KV_HEADS;
    let chunk = index / (p.tokens * HEAD_TILES * KV_HEADS) % (PAGE / CHUNK);
    let entry = entries[p.first_entry + index / (p.tokens * HEAD_TILES * KV_HEADS * (PAGE / CHUNK))];
    let row_index = entry.sequence * p.tq + token_index;
    let row = rows[row_index];
    let first = entry.logical * PAGE + chunk * CHUNK;
    if first >= row.visible {
        return;
    }
    let in_chunk = min(CHUNK, row.visible - first);
    let kv_row = (entry.page * KV_HEADS + kv_head) * PAGE + chunk * CHUNK;
    let first_head = tile_index * HEADS;

    // Logits come out in units of log 2, so that exp2 undoes them.
    for (var i = local; i < HEADS * QUERY_VECS; i += 256u) {
        var x = vec4<f32>();
        let head = first_head + i / QUERY_VECS;
        for (var c = 0u; c < 4u; c++) {
            let channel = i % QUERY_VECS * 4u + c;
            if channel < HEAD_DIM && head < GROUP {
                x[c] = query_element(entry.sequence, token_index, kv_head * GROUP + head, channel)
                    * (p.scale * 1.4426950408889634);
            }
        }
        queries[i] = x;
    }

    var count = in_chunk;
#ifdef SPARSE
    const OWN = (CHUNK + 255u) / 256u;
    var masks: array<u32, OWN>;
    var own = 0u;
    for (var i = 0u; i < OWN; i++) {
        let token = local * OWN + i;
        masks[i] = 0u;
        if token < in_chunk {
            var mask = 0u;
            if in_base(row, first + token) {
                mask = (1u << HEADS) - 1u;
            } else {
                for (var h = 0u; h < HEADS; h++) {
                    let head = min(first_head + h, GROUP - 1u);
                    let score_head = kv_head * SCORE_ROWS + min(head, SCORE_ROWS - 1u);
                    let score_row = (row_index - p.first_row) * (KV_HEADS * SCORE_ROWS) + score_head;
                    let threshold = scores[score_row * 2u];
                    let last_token = scores[score_row * 2u + 1u];
                    let key = scores[p.header + row.score_base + score_head * score_stride(row.visible) + first + token];
                    if key > threshold || (key == threshold && first + token <= last_token) {
                        mask |= 1u << h;
                    }
                }
            }
            masks[i] = mask;
            own += select(0u, 1u, mask != 0u);
        }
    }
    var at = inclusive_scan(local, own) - own;
    if local == 0u {
        chosen_total = scan_total();
    }
    // The same to all invocations, which the barriers below ask for.
    count = workgroupUniformLoad(&chosen_total);
    for (var i = 0u; i < OWN; i++) {
        if masks[i] != 0u {
            chosen[at] = (local * OWN + i) | (masks[i] << 16u);
            at++;
        }
    }
#endif
    // Queries and chosen keys were written by other invocations.
    workgroupBarrier();

    let lane = local % V_PIECES;
    let row_group = local / V_PIECES;
    let active_lane = row_group < ROW_GROUPS;
#repeat h HEADS
    var peak$h = MASKED;
    var sum$h = 0.0;
    var low$h = vec4<f32>();
    var high$h = vec4<f32>();
#end
    for (var base = 0u; base < count; base += TILE) {
        let tile = min(TILE, count - base);
        // Logits, 64 rows at a time, four invocations a row.
        for (var sub = 0u; sub < tile; sub += 64u) {
            let slot = sub + local / 4u;
#repeat h HEADS
            var dot$h = 0.0;
#end
            var mask = 0u;
            if slot < tile {
#ifdef SPARSE
                let pick = chosen[base + slot];
                mask = pick >> 16u;
                let token = pick & 0xffffu;
#else
                mask = 0xffffu;
                let token = base + slot;
#endif
                // All loads first. Pieces past the row's end are read twice and meet zeros of the query.
#repeat s K_STEPS
                let piece$s = local % 4u + 4u * $su;
                let words$s = k_pages[(kv_row + token) * K_PIECES + min(piece$s, K_PIECES - 1u)];
#end
#repeat s K_STEPS
                let a$s = piece_low(words$s);
#ifndef KV_F32
                let b$s = piece_high(words$s);
#endif
#repeat h HEADS
                dot$h += dot(a$s, queries[$hu * QUERY_VECS + piece$s * HALVES]);
#ifndef KV_F32
                dot$h += dot(b$s, queries[$hu * QUERY_VECS + piece$s * HALVES + 1u]);
#endif
#end
#end
            }
#ifdef SUBGROUPS
            // The four invocations of a row are neighbours in one subgroup.
#repeat h HEADS
            dot$h += subgroupShuffleXor(dot$h, 1u);
            dot$h += subgroupShuffleXor(dot$h, 2u);
            if local % 4u == $hu % 4u {
                logits[$hu * TILE + slot] = select(MASKED, dot$h, ((mask >> $hu) & 1u) == 1u);
            }
#end
#else
#repeat h HEADS
            workgroupBarrier();
            scratch[local].x = dot$h;
            workgroupBarrier();
            if local % 4u == 0u {
                let logit = (scratch[local].x + scratch[local + 1u].x) + (scratch[local + 2u].x + scratch[local + 3u].x);
                logits[$hu * TILE + slot] = select(MASKED, logit, ((mask >> $hu) & 1u) == 1u);
            }
#end
#endif
        }
        workgroupBarrier();
        // Peaks per group of rows; its invocations then share the exponentials.
        if active_lane {
#repeat h HEADS
            var top$h = peak$h;
            for (var i = row_group; i < tile; i += ROW_GROUPS) {
                top$h = max(top$h, logits[$hu * TILE + i]);
            }
            let keep$h = exp2(peak$h - top$h);
            peak$h = top$h;
            sum$h *= keep$h;
            low$h *= keep$h;
            high$h *= keep$h;
#end
        }
        workgroupBarrier();
        if active_lane {
            let mine = (tile + ROW_GROUPS - 1u - row_group) / ROW_GROUPS;
            for (var i = lane; i < mine; i += V_PIECES) {
#repeat h HEADS
                let at$h = $hu * TILE + row_group + i * ROW_GROUPS;
                let logit$h = logits[at$h];
                logits[at$h] = select(exp2(logit$h - peak$h), 0.0, logit$h <= MASKED);
#end
            }
        }
        workgroupBarrier();
        if active_lane {
            // Four rows at a time, all loads first; rows past the end are read again and weigh nothing.
            for (var i = row_group; i < tile; i += 4u * ROW_GROUPS) {
#repeat u 4
                let row$u = i + $uu * ROW_GROUPS;
                let safe$u = min(row$u, tile - 1u);
#ifdef SPARSE
                let words$u = v_pages[(kv_row + (chosen[base + safe$u] & 0xffffu)) * V_PIECES + lane];
#else
                let words$u = v_pages[(kv_row + base + safe$u) * V_PIECES + lane];
#endif
#end
#repeat u 4
                let a$u = piece_low(words$u);
#ifndef KV_F32
                let b$u = piece_high(words$u);
#endif
#repeat h HEADS
                let weight$u_$h = select(0.0, logits[$hu * TILE + safe$u], row$u < tile);
                sum$h += weight$u_$h;
                low$h += weight$u_$h * a$u;
#ifndef KV_F32
                high$h += weight$u_$h * b$u;
#endif
#end
#end
            }
        }
        workgroupBarrier();
    }

    // The groups of rows merge by their peaks, one head at a time.
#repeat h HEADS
    workgroupBarrier();
    if active_lane && lane == 0u {
        scratch[row_group] = vec4<f32>(peak$h, sum$h, 0.0, 0.0);
    }
    workgroupBarrier();
    var top_of$h = MASKED;
    for (var g = 0u; g < ROW_GROUPS; g++) {
        top_of$h = max(top_of$h, scratch[g].x);
    }
    var sum_of$h = 0.0;
    for (var g = 0u; g < ROW_GROUPS; g++) {
        sum_of$h += scratch[g].y * exp2(scratch[g].x - top_of$h);
    }
    let head$h = first_head + $hu;
    let part$h = row.part_base + (kv_head * GROUP + min(head$h, GROUP - 1u)) * row.part_count + first / CHUNK;
    let weight_of$h = exp2(peak$h - top_of$h);
    merge_groups(local, low$h * weight_of$h, head$h < GROUP, part$h * PART_STRIDE + 4u + local * PIECE);
#ifndef KV_F32
    merge_groups(local, high$h * weight_of$h, head$h < GROUP, part$h * PART_STRIDE + 8u + local * PIECE);
#endif
    if local == 0u && head$h < GROUP {
        partials[part$h * PART_STRIDE] = top_of$h;
        partials[part$h * PART_STRIDE + 1u] = sum_of$h;
    }
#end
}
