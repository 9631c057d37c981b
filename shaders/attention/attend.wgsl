#import params
#import rows
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
struct Entry {
    sequence: u32,
    logical: u32,
    page: u32,
    reserved: u32,
}
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
const QUERY_VECS: u32 = K_PIECES * HALVES;
var<workgroup> queries: array<vec4<f32>, HEADS * QUERY_VECS>;
var<workgroup> logits: array<f32, HEADS * TILE>;
var<workgroup> scratch: array<vec4<f32>, 256>;
#ifdef SPARSE
// Token in the chunk, and which heads chose it from bit 16 on.
var<workgroup> chosen: array<u32, CHUNK>;
#endif

fn store_partial(at: u32, sum: f32, peak: f32) {
    partials[at] = peak;
    partials[at + 1u] = sum;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let token_index = index % p.tq;
    let tile_index = index / p.tq % HEAD_TILES;
    let kv_head = index / (p.tq * HEAD_TILES) % KV_HEADS;
    let chunk = index / (p.tq * HEAD_TILES * KV_HEADS) % (PAGE / CHUNK);
    let entry = entries[p.first_entry + index / (p.tq * HEAD_TILES * KV_HEADS * (PAGE / CHUNK))];
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
                    let score_row = row_index * (KV_HEADS * SCORE_ROWS) + score_head;
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
    count = scan_total();
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
    var peak: array<f32, HEADS>;
    var sum: array<f32, HEADS>;
    var total: array<vec4<f32>, HEADS * HALVES>;
    for (var h = 0u; h < HEADS; h++) {
        peak[h] = MASKED;
        sum[h] = 0.0;
        for (var half = 0u; half < HALVES; half++) {
            total[h * HALVES + half] = vec4<f32>();
        }
    }
    for (var base = 0u; base < count; base += TILE) {
        let tile = min(TILE, count - base);
        // Logits, 64 rows at a time, four invocations a row.
        for (var sub = 0u; sub < TILE; sub += 64u) {
            let slot = sub + local / 4u;
            var dots: array<f32, HEADS>;
            for (var h = 0u; h < HEADS; h++) {
                dots[h] = 0.0;
            }
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
                for (var piece = local % 4u; piece < K_PIECES; piece += 4u) {
                    let words = k_pages[(kv_row + token) * K_PIECES + piece];
                    let a = piece_low(words);
                    for (var h = 0u; h < HEADS; h++) {
                        dots[h] += dot(a, queries[h * QUERY_VECS + piece * HALVES]);
                    }
#ifndef KV_F32
                    let b = piece_high(words);
                    for (var h = 0u; h < HEADS; h++) {
                        dots[h] += dot(b, queries[h * QUERY_VECS + piece * HALVES + 1u]);
                    }
#endif
                }
            }
            for (var h4 = 0u; h4 < HEADS; h4 += 4u) {
                workgroupBarrier();
                var part = vec4<f32>();
                for (var h = 0u; h < 4u; h++) {
                    if h4 + h < HEADS {
                        part[h] = dots[h4 + h];
                    }
                }
                scratch[local] = part;
                workgroupBarrier();
                // Each of a row's four invocations adds up one head.
                let h = local % 4u;
                if h4 + h < HEADS {
                    let r = local - h;
                    let logit = (scratch[r][h] + scratch[r + 1u][h]) + (scratch[r + 2u][h] + scratch[r + 3u][h]);
                    logits[(h4 + h) * TILE + slot] = select(MASKED, logit, ((mask >> (h4 + h)) & 1u) == 1u);
                }
            }
        }
        workgroupBarrier();
        // Peaks per group of rows; its invocations then share the exponentials.
        if active_lane {
            for (var h = 0u; h < HEADS; h++) {
                var top = peak[h];
                for (var i = row_group; i < tile; i += ROW_GROUPS) {
                    top = max(top, logits[h * TILE + i]);
                }
                let keep = exp2(peak[h] - top);
                peak[h] = top;
                sum[h] *= keep;
                for (var half = 0u; half < HALVES; half++) {
                    total[h * HALVES + half] *= keep;
                }
            }
        }
        workgroupBarrier();
        if active_lane {
            let mine = (tile + ROW_GROUPS - 1u - row_group) / ROW_GROUPS;
            for (var h = 0u; h < HEADS; h++) {
                for (var i = lane; i < mine; i += V_PIECES) {
                    let at = h * TILE + row_group + i * ROW_GROUPS;
                    let logit = logits[at];
                    logits[at] = select(exp2(logit - peak[h]), 0.0, logit <= MASKED);
                }
            }
        }
        workgroupBarrier();
        if active_lane {
            for (var i = row_group; i < tile; i += ROW_GROUPS) {
#ifdef SPARSE
                let token = chosen[base + i] & 0xffffu;
#else
                let token = base + i;
#endif
                let words = v_pages[(kv_row + token) * V_PIECES + lane];
                let a = piece_low(words);
#ifndef KV_F32
                let b = piece_high(words);
#endif
                for (var h = 0u; h < HEADS; h++) {
                    let weight = logits[h * TILE + i];
                    sum[h] += weight;
                    total[h * HALVES] += weight * a;
#ifndef KV_F32
                    total[h * HALVES + 1u] += weight * b;
#endif
                }
            }
        }
        workgroupBarrier();
    }

    // The groups of rows merge by their peaks, one head at a time.
    for (var h = 0u; h < HEADS; h++) {
        workgroupBarrier();
        if active_lane && lane == 0u {
            scratch[row_group] = vec4<f32>(peak[h], sum[h], 0.0, 0.0);
        }
        workgroupBarrier();
        var top = MASKED;
        for (var g = 0u; g < ROW_GROUPS; g++) {
            top = max(top, scratch[g].x);
        }
        var all = 0.0;
        for (var g = 0u; g < ROW_GROUPS; g++) {
            all += scratch[g].y * exp2(scratch[g].x - top);
        }
        let head = first_head + h;
        let part = row.part_base + (kv_head * GROUP + min(head, GROUP - 1u)) * row.part_count + first / CHUNK;
        let at = part * PART_STRIDE;
        let keep = exp2(peak[h] - top);
        for (var half = 0u; half < HALVES; half++) {
            workgroupBarrier();
            scratch[local] = total[h * HALVES + half] * keep;
            workgroupBarrier();
            if local < V_PIECES && head < GROUP {
                var value = vec4<f32>();
                for (var g = 0u; g < ROW_GROUPS; g++) {
                    value += scratch[g * V_PIECES + local];
                }
                let channel = 4u + (local * HALVES + half) * 4u;
                partials[at + channel] = value.x;
                partials[at + channel + 1u] = value.y;
                partials[at + channel + 2u] = value.z;
                partials[at + channel + 3u] = value.w;
            }
        }
        if local == 0u && head < GROUP {
            store_partial(at, all, top);
        }
    }
}
