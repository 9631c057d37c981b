#import params
#import rows
#import order
// Scores every key of a chunk for the query heads of its kv head, and counts the scores in the row's histogram.
// One workgroup per (page entry, chunk, kv head, query token); TOKENS keys per invocation.
struct Entry {
    sequence: u32,
    logical: u32,
    page: u32,
    reserved: u32,
}
@group(0) @binding(1) var<storage, read> index_pages: array<u32>;
@group(0) @binding(2) var<storage, read> entries: array<Entry>;
@group(0) @binding(3) var<storage, read> rows: array<Row>;
@group(0) @binding(4) var<storage, read> tables: array<f32>;
@group(0) @binding(5) var<storage, read_write> scores: array<u32>;
@group(0) @binding(6) var<storage, read_write> histogram: array<atomic<u32>>;

const TABLE_ROW: u32 = 4u + ENTRIES;
const BLOCK_ENTRIES: u32 = BLOCK_TABLES * DIGITS * 16u;
const CODE_MASK: u32 = (1u << PLANES) - 1u;
var<workgroup> lookup: array<f32, HEADS_PER_PASS * BLOCK_ENTRIES>;
var<workgroup> counts: array<atomic<u32>, BINS>;

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
    if first >= row.visible {
        return;
    }
    let page_head = entry.page * KV_HEADS + kv_head;
    // Chunks shorter than the workgroup: the surplus invocations read along and write nothing.
    let in_page = chunk * CHUNK + min(local, CHUNK - 1u);
    let table_row = (block_row * KV_HEADS + kv_head) * SCORING_HEADS;

    var gain: array<f32, TOKENS>;
    var bias: array<f32, TOKENS>;
    var mean: array<f32, TOKENS>;
    for (var i = 0u; i < TOKENS; i++) {
        gain[i] = 1.0;
        bias[i] = 0.0;
        mean[i] = 0.0;
#ifdef SCALARS
        gain[i] = bitcast<f32>(index_pages[(page_head * INDEX_WORDS + WORDS) * PAGE + in_page + i * 256u]);
#endif
#ifdef BIAS
        bias[i] = bitcast<f32>(index_pages[(page_head * INDEX_WORDS + WORDS + 1u) * PAGE + in_page + i * 256u]);
#endif
    }
    for (var pass_head = 0u; pass_head < SCORING_HEADS; pass_head += HEADS_PER_PASS) {
        var sum: array<f32, TOKENS * HEADS_PER_PASS>;
        for (var i = 0u; i < TOKENS * HEADS_PER_PASS; i++) {
            sum[i] = 0.0;
        }
        for (var block = 0u; block < TABLES; block += BLOCK_TABLES) {
            workgroupBarrier();
            for (var i = local; i < HEADS_PER_PASS * BLOCK_ENTRIES; i += 256u) {
                let g = i / BLOCK_ENTRIES;
                let at = block * DIGITS * 16u + i % BLOCK_ENTRIES;
                lookup[i] = 0.0;
                if pass_head + g < SCORING_HEADS && at < ENTRIES {
                    lookup[i] = tables[(table_row + pass_head + g) * TABLE_ROW + 4u + at];
                }
            }
            workgroupBarrier();
            let last_word = min(WORDS, (block + BLOCK_TABLES) / TABLES_PER_WORD);
            for (var i = 0u; i < TOKENS; i++) {
                for (var w = block / TABLES_PER_WORD; w < last_word; w++) {
                    var codes = index_pages[(page_head * INDEX_WORDS + w) * PAGE + in_page + i * 256u];
                    var at = (w * TABLES_PER_WORD - block) * DIGITS * 16u;
                    // Tables past the last have zero entries.
                    for (var t = 0u; t < TABLES_PER_WORD; t++) {
                        let code = codes & CODE_MASK;
                        codes = codes >> PLANES;
                        for (var g = 0u; g < HEADS_PER_PASS; g++) {
                            let base = g * BLOCK_ENTRIES + at;
#ifdef PRODUCT
                            var value = lookup[base + (code & 15u)];
                            for (var d = 1u; d < DIGITS; d++) {
                                value *= lookup[base + d * 16u + ((code >> (d * 4u)) & 15u)];
                            }
                            sum[i * HEADS_PER_PASS + g] += value;
#else
                            for (var d = 0u; d < DIGITS; d++) {
                                sum[i * HEADS_PER_PASS + g] += lookup[base + d * 16u + ((code >> (d * 4u)) & 15u)];
                            }
#endif
                        }
                        at += DIGITS * 16u;
                    }
                }
            }
        }
        for (var g = 0u; g < HEADS_PER_PASS; g++) {
            let head = pass_head + g;
            if head < SCORING_HEADS {
#ifdef MEAN_SCORE
                for (var i = 0u; i < TOKENS; i++) {
                    mean[i] += gain[i] * sum[i * HEADS_PER_PASS + g] + bias[i];
                }
                let last = head + 1u == SCORING_HEADS;
#else
                let last = true;
#endif
                if last {
                    workgroupBarrier();
                    for (var i = local; i < BINS; i += 256u) {
                        atomicStore(&counts[i], 0u);
                    }
                    workgroupBarrier();
#ifdef MEAN_SCORE
                    let score_head = 0u;
#else
                    let score_head = head;
#endif
                    let header = (table_row + score_head) * TABLE_ROW;
                    let low = tables[header];
                    let inverse_width = tables[header + 1u];
                    let shift = tables[header + 2u];
                    let score_row = (block_row * KV_HEADS + kv_head) * SCORE_ROWS + score_head;
                    let scores_at = p.header + row.score_base
                        + (kv_head * SCORE_ROWS + score_head) * score_stride(row.visible);
                    for (var i = 0u; i < TOKENS; i++) {
                        let token = first + local + i * 256u;
                        if local + i * 256u < CHUNK && token < row.visible {
#ifdef MEAN_SCORE
                            let score = mean[i] * (1.0 / f32(SCORING_HEADS));
#else
                            let score = gain[i] * sum[i * HEADS_PER_PASS + g] + (bias[i] + shift);
#endif
                            let key = order_key(score);
                            scores[scores_at + token] = key;
#ifdef DISJOINT
                            let contested = !in_base(row, token);
#else
                            let contested = true;
#endif
                            if contested {
                                atomicAdd(&counts[order_bin(key, low, inverse_width)], 1u);
                            }
                        }
                    }
                    workgroupBarrier();
                    for (var i = local; i < BINS; i += 256u) {
                        let count = atomicLoad(&counts[i]);
                        if count > 0u {
                            atomicAdd(&histogram[score_row * HISTOGRAM_ROW + i], count);
                        }
                    }
                }
            }
        }
    }
}
