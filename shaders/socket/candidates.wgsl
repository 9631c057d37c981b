#import params
#import rows
#import entries
#import order
#import ranges
#import exact_key
// Lists the keys within the bounds of a row's threshold, and counts those above: one workgroup per (page entry, chunk, kv
// head, query token). Where scores are coarse, the list has the keys' places in the index instead, for the next kernel to
// score them again; keys that the list has no room for are scored again here.
@group(0) @binding(1) var<storage, read> index_pages: array<u32>;
@group(0) @binding(2) var<storage, read> entries: array<Entry>;
@group(0) @binding(3) var<storage, read> rows: array<Row>;
@group(0) @binding(4) var<storage, read> tables: array<f32>;
@group(0) @binding(5) var<storage, read_write> scores: array<u32>;
@group(0) @binding(6) var<storage, read_write> histogram: array<atomic<u32>>;
@group(0) @binding(7) var<storage, read_write> candidates: array<u32>;

// A chunk's keys of one head always fit.
const FOUND: u32 = 1024u;
// Token in the chunk, head from bit 16 on, and the key.
var<workgroup> found: array<vec2<u32>, FOUND>;
var<workgroup> found_count: atomic<u32>;
var<workgroup> found_total: u32;
var<workgroup> counts: array<atomic<u32>, SCORE_ROWS>;
var<workgroup> above: array<atomic<u32>, SCORE_ROWS>;
var<workgroup> places: array<u32, SCORE_ROWS>;
var<workgroup> bounds: array<vec2<u32>, SCORE_ROWS>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let token_index = p.first_token + index % p.tokens;
    let kv_head = index / p.tokens % KV_HEADS;
    let chunk = index / (p.tokens * KV_HEADS) % (PAGE / CHUNK);
    let entry = entries[p.first_entry + index / (p.tokens * KV_HEADS * (PAGE / CHUNK))];
    let row_index = entry.sequence * p.tq + token_index;
    let block_row = row_index - p.first_row;
    let row = rows[row_index];
    let first = entry.logical * PAGE + chunk * CHUNK;
    // Rows that keep every key need no threshold.
    if first >= row.visible || row.heavy >= row.visible || row.heavy == 0u {
        return;
    }
    let in_chunk = min(CHUNK, row.visible - first);
    let first_row = (block_row * KV_HEADS + kv_head) * SCORE_ROWS;
    let scores_at = p.header + row.score_base + kv_head * SCORE_ROWS * score_stride(row.visible) + first;
    for (var h = local; h < SCORE_ROWS; h += 256u) {
        let bounds_at = (first_row + h) * HISTOGRAM_ROW + BINS + 2u;
        bounds[h] = vec2<u32>(atomicLoad(&histogram[bounds_at]), atomicLoad(&histogram[bounds_at + 1u]));
    }
    // All heads at once, or where that finds more than there is room for, one after the other.
    var head = 0u;
    var last_head = SCORE_ROWS;
    while head < SCORE_ROWS {
        if local == 0u {
            atomicStore(&found_count, 0u);
        }
        for (var h = local; h < SCORE_ROWS; h += 256u) {
            atomicStore(&counts[h], 0u);
            atomicStore(&above[h], 0u);
        }
        workgroupBarrier();
        // The next head's scores are on their way while one's are looked at.
#repeat c 4
        var next$c = 0u;
        if local + $cu * 256u < in_chunk {
            next$c = scores[scores_at + head * score_stride(row.visible) + local + $cu * 256u];
        }
#end
        for (var h = head; h < last_head; h++) {
            let low = bounds[h].x;
            let high = bounds[h].y;
            let next_at = scores_at + min(h + 1u, last_head - 1u) * score_stride(row.visible) + local;
#repeat c 4
            let key$c = next$c;
            if local + $cu * 256u < in_chunk {
                next$c = scores[next_at + $cu * 256u];
            }
#end
            if local < in_chunk && low <= high {
                var higher = 0u;
#repeat c 4
                {
                    let key = key$c;
                    let token = local + $cu * 256u;
#ifdef DISJOINT
                    let contested = token < in_chunk && !in_base(row, first + token);
#else
                    let contested = token < in_chunk;
#endif
                    if contested && key > high {
                        higher += 1u;
                    } else if contested && key >= low {
                        atomicAdd(&counts[h], 1u);
                        let at = atomicAdd(&found_count, 1u);
                        if at < FOUND {
                            found[at] = vec2<u32>(token | (h << 16u), key);
                        }
                    }
                }
#end
                if higher > 0u {
                    atomicAdd(&above[h], higher);
                }
            }
        }
        workgroupBarrier();
        if local == 0u {
            found_total = atomicLoad(&found_count);
        }
        // The same to all invocations, which barriers below ask for.
        let total = workgroupUniformLoad(&found_total);
        if total > FOUND {
            last_head = head + 1u;
        } else {
            // Places in the rows' lists. A row with more candidates than its list holds is searched whole by the next
            // kernel.
            for (var h = head + local; h < last_head; h += 256u) {
                let count = atomicLoad(&counts[h]);
                if count > 0u {
                    places[h] = atomicAdd(&histogram[(first_row + h) * HISTOGRAM_ROW + BINS], count);
                    atomicStore(&counts[h], 0u);
                }
                let higher = atomicLoad(&above[h]);
                if higher > 0u {
                    atomicAdd(&histogram[(first_row + h) * HISTOGRAM_ROW + BINS + 1u], higher);
                }
            }
            workgroupBarrier();
            for (var i = local; i < total; i += 256u) {
                let found_token = found[i].x & 0xffffu;
                let h = found[i].x >> 16u;
                let score_row = first_row + h;
                let at = places[h] + atomicAdd(&counts[h], 1u);
#ifdef COARSE
                let key_at = (entry.page * KV_HEADS + kv_head) * INDEX_WORDS * PAGE + chunk * CHUNK + found_token;
                if at >= CANDIDATES {
                    let exact = exact_key(key_at, ((block_row * KV_HEADS + kv_head) * SCORING_HEADS + h) * TABLE_ROW);
                    let at_score = scores_at + h * score_stride(row.visible) + found_token;
                    scores[at_score] = clamp(exact, bounds[h].x, bounds[h].y);
                }
                let word = key_at;
                let token_word = (first + found_token) | COARSE_TOKEN;
#else
                let word = found[i].y;
                let token_word = first + found_token;
#endif
                if at < CANDIDATES {
                    candidates[(score_row * CANDIDATES + at) * 2u] = word;
                    candidates[(score_row * CANDIDATES + at) * 2u + 1u] = token_word;
                }
            }
            head = last_head;
            last_head = head + 1u;
        }
        workgroupBarrier();
    }
}
