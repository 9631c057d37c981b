#import params
#import rows
#import entries
#import runs
#import order
#import ranges
#import exact_key
// Lists the keys within the bounds of a row's threshold, and counts those above: one workgroup per (`max_count` chunks of
// pages, kv head, query token): the more chunks, the less often bounds are fetched and counts handed over. Where scores
// are coarse, the list has the keys' places in the index instead, for the next kernel to score them again; keys that the
// list has no room for are scored again here.
@group(0) @binding(1) var<storage, read> index_pages: array<u32>;
@group(0) @binding(2) var<storage, read> entries: array<Entry>;
@group(0) @binding(3) var<storage, read> rows: array<Row>;
@group(0) @binding(4) var<storage, read> tables: array<f32>;
@group(0) @binding(5) var<storage, read_write> scores: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> histogram: array<atomic<u32>>;
@group(0) @binding(7) var<storage, read_write> candidates: array<u32>;

// Keys that a workgroup keeps until its end; more are handed over one by one.
const FOUND: u32 = 1024u;
// Token in the chunk, chunk of the run from bit 10 on, head from bit 16 on; and the key.
var<workgroup> found: array<vec2<u32>, FOUND>;
var<workgroup> found_count: atomic<u32>;
var<workgroup> counts: array<atomic<u32>, SCORE_ROWS>;
var<workgroup> above: array<atomic<u32>, SCORE_ROWS>;
var<workgroup> places: array<u32, SCORE_ROWS>;
var<workgroup> bounds: array<vec2<u32>, SCORE_ROWS>;

// What a workgroup's keys have in common.
struct Run {
    row: Row,
    kv_head: u32,
    first_row: u32,
    first_table: u32,
    // Scores of a row, and the first of the kv head's first row.
    stride: u32,
    first_score: u32,
    // The first chunk.
    unit: u32,
}

// Where an invocation's four scores lie of one chunk and head, numbered head by head and chunk by chunk.
struct Quad {
    h: u32,
    // The first of their tokens in the chunk and in the sequence, and how many there are.
    in_chunk: u32,
    token: u32,
    count: u32,
    // The chunk's number in the run.
    unit: u32,
    at: u32,
}

fn quad_of(run: Run, number: u32, units: u32, own: u32) -> Quad {
    let h = number % SCORE_ROWS;
    let unit = min(number / SCORE_ROWS, units - 1u);
    let first = first_token(run.unit + unit);
    let end = min(CHUNK, max(run.row.visible, first) - first);
    let count = select(0u, min(4u, max(end, own) - own), number < units * SCORE_ROWS);
    return Quad(h, own, first + own, count, unit, (run.first_score + h * run.stride + first + own) / 4u);
}

fn which_of(quad: Quad) -> u32 {
    return quad.in_chunk | (quad.unit << 10u) | (quad.h << 16u);
}

// Puts a key at a place of its row's list.
fn give(run: Run, which: u32, key: u32, at: u32) {
    let token = which & 0x3ffu;
    let unit = run.unit + ((which >> 10u) & 0x3fu);
    let h = which >> 16u;
#ifdef COARSE
    let entry = entries[p.first_entry + unit / UNITS];
    let word = (entry.page * KV_HEADS + run.kv_head) * INDEX_WORDS * PAGE + unit % UNITS * CHUNK + token;
    let token_word = (first_token(unit) + token) | COARSE_TOKEN;
    if at >= CANDIDATES {
        let exact = exact_key(word, (run.first_table + h) * TABLE_ROW);
        let at_score = run.first_score + h * run.stride + first_token(unit) + token;
        scores[at_score / 4u][at_score % 4u] = clamp(exact, bounds[h].x, bounds[h].y);
    }
#else
    let word = key;
    let token_word = first_token(unit) + token;
#endif
    if at < CANDIDATES {
        let candidate = ((run.first_row + h) * CANDIDATES + at) * 2u;
        candidates[candidate] = word;
        candidates[candidate + 1u] = token_word;
    }
}

// Keeps those of four keys that lie within the bounds, and counts those above. Gives those that the list of the workgroup
// has no room for, one bit each.
fn look_through(run: Run, quad: Quad, keys: vec4<u32>) -> u32 {
    let low = bounds[quad.h].x;
    let high = bounds[quad.h].y;
    if quad.count == 0u || low > high {
        return 0u;
    }
    var higher = 0u;
    var crowded = 0u;
#repeat c 4
    {
        let key = keys[$c];
#ifdef DISJOINT
        let contested = $cu < quad.count && !in_base(run.row, quad.token + $cu);
#else
        let contested = $cu < quad.count;
#endif
        if contested && key > high {
            higher += 1u;
        } else if contested && key >= low {
            let at = atomicAdd(&found_count, 1u);
            if at < FOUND {
                atomicAdd(&counts[quad.h], 1u);
                found[at] = vec2<u32>(which_of(quad) + $cu, key);
            } else {
                crowded |= 1u << $cu;
            }
        }
    }
#end
    if higher > 0u {
        atomicAdd(&above[quad.h], higher);
    }
    return crowded;
}

// Looks through chunks of one sequence, of which the first are the first to lie past its last key.
fn list_run(local: u32, token_index: u32, kv_head: u32, run_start: u32, run_end: u32) {
    let row_index = sequence_of(run_start) * p.tq + token_index;
    let group = (row_index - p.first_row) * KV_HEADS + kv_head;
    let row = rows[row_index];
    let stride = score_stride(row.visible);
    let first_score = p.header + row.score_base + kv_head * SCORE_ROWS * stride;
    let run = Run(row, kv_head, group * SCORE_ROWS, group * SCORING_HEADS, stride, first_score, run_start);
    // Rows that keep every key need no threshold.
    if row.heavy >= row.visible || row.heavy == 0u || first_token(run_start) >= row.visible {
        return;
    }
    // Neighbouring tokens by the same invocation: one load for four. Rows are padded to whole ones.
    let own = local * 4u;
    let units = run_end - run_start;
#repeat j QUADS
    let first$j = quad_of(run, $ju, units, own);
    var next$j = vec4<u32>();
    if first$j.count > 0u {
        next$j = scores[first$j.at];
    }
#end
    // What an earlier run left there has been read.
    workgroupBarrier();
    for (var h = local; h < SCORE_ROWS; h += 256u) {
        let bounds_at = (run.first_row + h) * HISTOGRAM_ROW + BINS + 2u;
        bounds[h] = vec2<u32>(atomicLoad(&histogram[bounds_at]), atomicLoad(&histogram[bounds_at + 1u]));
        atomicStore(&counts[h], 0u);
        atomicStore(&above[h], 0u);
    }
    if local == 0u {
        atomicStore(&found_count, 0u);
    }
    workgroupBarrier();
    for (var number = 0u; number < units * SCORE_ROWS; number += QUADS) {
        // The next scores are on their way while these are looked at.
#repeat j QUADS
        let keys$j = next$j;
        let after$j = quad_of(run, number + QUADS + $ju, units, own);
        if after$j.count > 0u {
            next$j = scores[after$j.at];
        }
#end
        var crowded = 0u;
#repeat j QUADS
        crowded |= look_through(run, quad_of(run, number + $ju, units, own), keys$j) << ($ju * 4u);
#end
        for (; crowded > 0u; crowded &= crowded - 1u) {
            let bit = firstTrailingBit(crowded);
            let quad = quad_of(run, number + bit / 4u, units, own);
            var keys = keys0;
#repeat j QUADS
            keys = select(keys, keys$j, bit / 4u == $ju);
#end
            // A full list needs no more than to be known as such.
            let listed = (run.first_row + quad.h) * HISTOGRAM_ROW + BINS;
            var at = CANDIDATES;
            if atomicLoad(&histogram[listed]) <= CANDIDATES {
                at = atomicAdd(&histogram[listed], 1u);
            }
            give(run, which_of(quad) + bit % 4u, keys[bit % 4u], at);
        }
    }
    workgroupBarrier();
    // Places in the rows' lists. A row with more candidates than its list holds is searched whole by the next kernel.
    for (var h = local; h < SCORE_ROWS; h += 256u) {
        let at = (run.first_row + h) * HISTOGRAM_ROW + BINS;
        let count = atomicLoad(&counts[h]);
        if count > 0u {
            places[h] = atomicAdd(&histogram[at], count);
            atomicStore(&counts[h], 0u);
        }
        let higher = atomicLoad(&above[h]);
        if higher > 0u {
            atomicAdd(&histogram[at + 1u], higher);
        }
    }
    workgroupBarrier();
    for (var i = local; i < min(atomicLoad(&found_count), FOUND); i += 256u) {
        let h = found[i].x >> 16u;
        give(run, found[i].x, found[i].y, places[h] + atomicAdd(&counts[h], 1u));
    }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let token_index = p.first_token + index % p.tokens;
    let kv_head = index / p.tokens % KV_HEADS;
    let first_unit = index / (p.tokens * KV_HEADS) * p.max_count;
    let last_unit = min(first_unit + p.max_count, p.entries * UNITS);
    for (var run = first_unit; run < last_unit;) {
        let run_end = end_of_run(run, last_unit);
        list_run(local, token_index, kv_head, run, run_end);
        run = run_end;
    }
}
