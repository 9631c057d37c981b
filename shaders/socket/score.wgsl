#import params
#import rows
#import entries
#import runs
#import order
#import ranges
// Scores every key of some chunks for the query heads of its kv head, and counts the scores in the row's histogram.
// One workgroup per (`max_count` chunks of pages, kv head, query token): the more chunks, the less often tables are
// fetched and counts handed over. TOKENS keys per invocation, whose codes are read once for the heads of a pass. Heads
// share look-ups in pairs: a digit's 16 entries of two heads fill every bank once.
@group(0) @binding(1) var<storage, read> index_pages: array<u32>;
@group(0) @binding(2) var<storage, read> entries: array<Entry>;
@group(0) @binding(3) var<storage, read> rows: array<Row>;
@group(0) @binding(4) var<storage, read> tables: array<f32>;
@group(0) @binding(5) var<storage, read_write> scores: array<u32>;
@group(0) @binding(6) var<storage, read_write> histogram: array<atomic<u32>>;

#ifdef PAIRS
alias Looked = vec2<f32>;
const WAYS: u32 = 2u;

fn part(looked: Looked, way: u32) -> f32 {
    return select(looked.x, looked.y, way == 1u);
}
#else
alias Looked = f32;
const WAYS: u32 = 1u;

fn part(looked: Looked, way: u32) -> f32 {
    return looked;
}
#endif

const BLOCK_ENTRIES: u32 = BLOCK_TABLES * DIGITS * 16u;
const CODE_MASK: u32 = (1u << PLANES) - 1u;
const HEADS_PER_PASS: u32 = PASS_PAIRS * WAYS;
#ifdef MEAN_SCORE
const COUNTED: u32 = 1u;
#else
const COUNTED: u32 = HEADS_PER_PASS;
#endif
// Two bins to a word: a chunk has fewer keys than 16 bits count.
const COUNT_WORDS: u32 = BINS / 2u;
#ifdef COARSE
// Entries of four heads of 16 bits: halves of a product's factors, or whole numbers of units of a sum's.
var<workgroup> lookup: array<vec2<u32>, BLOCK_ENTRIES>;
#else
var<workgroup> lookup: array<Looked, PASS_PAIRS * BLOCK_ENTRIES>;
#endif
var<workgroup> counts: array<atomic<u32>, COUNTED * COUNT_WORDS>;
var<workgroup> ranges: array<Range, COUNTED>;

// Loads without a branch, so that many are under way together.
fn table_entry(row: u32, head: u32, at: u32) -> f32 {
    let entry = tables[(row + min(head, SCORING_HEADS - 1u)) * TABLE_ROW + TABLE_HEADER + min(at, ENTRIES - 1u)];
    return select(0.0, entry, head < SCORING_HEADS && at < ENTRIES);
}

#ifdef COARSE
// A factor as a half, to the nearest; what is no normal number becomes zero.
fn coarse_half(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let rounded = (bits + 0xfffu + ((bits >> 13u) & 1u) - 0x38000000u) >> 13u;
    return select(0u, rounded, x >= 6.103515625e-5);
}

// Entries of two heads in one word; `inverse` has how many units are 1, for sums.
fn coarse_pair(entries: vec2<f32>, inverse: vec2<f32>) -> u32 {
#ifdef PRODUCT
    return coarse_half(entries.x) | (coarse_half(entries.y) << 16u);
#else
    // The carry of a negative low one is undone at the end.
    let units = vec2<i32>(round(entries * inverse));
    return u32(units.x + (units.y << 16u));
#endif
}

fn coarse_sums(sums: u32) -> vec2<f32> {
    let low = i32(sums << 16u) >> 16u;
    return vec2<f32>(f32(low), f32((i32(sums) - low) >> 16u));
}
#endif

// Scores chunks of one sequence, of which the first are the first to lie past its last key.
fn score_run(local: u32, token_index: u32, kv_head: u32, run: u32, run_end: u32) {
    let row_index = sequence_of(run) * p.tq + token_index;
    let block_row = row_index - p.first_row;
    let row = rows[row_index];
    let table_row = (block_row * KV_HEADS + kv_head) * SCORING_HEADS;
#ifdef MEAN_SCORE
#repeat i TOKENS
    var mean$i = 0.0;
#end
#endif
    for (var pass_head = 0u; pass_head < SCORING_HEADS; pass_head += HEADS_PER_PASS) {
        for (var i = local; i < COUNTED * COUNT_WORDS; i += 256u) {
            atomicStore(&counts[i], 0u);
        }
        if local < COUNTED {
#ifdef MEAN_SCORE
            ranges[local] = range_at(table_row * TABLE_ROW);
#else
            ranges[local] = range_at((table_row + min(pass_head + local, SCORING_HEADS - 1u)) * TABLE_ROW);
#endif
        }
#ifdef MEAN_SCORE
        let pass_heads = 1u;
#else
        let pass_heads = min(HEADS_PER_PASS, SCORING_HEADS - pass_head);
#endif
#ifdef COARSE
        var inverse = vec4<f32>();
#ifndef PRODUCT
#repeat h 4
        inverse[$h] = tables[(table_row + min(pass_head + $hu, SCORING_HEADS - 1u)) * TABLE_ROW + INVERSE_UNIT];
#end
#endif
#endif
        for (var unit = run; unit < run_end; unit++) {
            let entry = entries[p.first_entry + unit / UNITS];
            let first = first_token(unit);
            if first >= row.visible {
                break;
            }
            // Chunks shorter than the workgroup: the surplus invocations read along and write nothing.
            let index_at = (entry.page * KV_HEADS + kv_head) * INDEX_WORDS * PAGE + unit % UNITS * CHUNK + min(local, CHUNK - 1u);
#repeat i TOKENS
            var gain$i = 1.0;
            var bias$i = 0.0;
#ifdef SCALARS
            gain$i = bitcast<f32>(index_pages[index_at + WORDS * PAGE + $iu * 256u]);
#endif
#ifdef BIAS
            bias$i = bitcast<f32>(index_pages[index_at + (WORDS + 1u) * PAGE + $iu * 256u]);
#endif
#end
#repeat g PASS_PAIRS
#repeat i TOKENS
            var sum$g_$i = Looked();
#end
#end
#ifdef COARSE
#ifndef PRODUCT
#repeat i TOKENS
            var units$i = vec2<u32>();
#end
#endif
#endif
            for (var block = 0u; block < TABLES; block += BLOCK_TABLES) {
                let first_word = block / TABLES_PER_WORD;
                let last_word = min(WORDS, (block + BLOCK_TABLES) / TABLES_PER_WORD);
                // The next word is on its way while one is looked up.
#repeat i TOKENS
                var next$i = index_pages[index_at + first_word * PAGE + $iu * 256u];
#end
                // Tables that fit whole stay for all chunks.
                if unit == run || BLOCK_TABLES < TABLES {
                    workgroupBarrier();
#ifdef COARSE
                    for (var i = local; i < BLOCK_ENTRIES; i += 1024u) {
                        let at = block * DIGITS * 16u + i;
#repeat e 4
                        let entries$e = vec4<f32>(
                            table_entry(table_row, pass_head, at + $eu * 256u),
                            table_entry(table_row, pass_head + 1u, at + $eu * 256u),
                            table_entry(table_row, pass_head + 2u, at + $eu * 256u),
                            table_entry(table_row, pass_head + 3u, at + $eu * 256u));
#end
#repeat e 4
                        if i + $eu * 256u < BLOCK_ENTRIES {
                            lookup[i + $eu * 256u] = vec2<u32>(
                                coarse_pair(entries$e.xy, inverse.xy),
                                coarse_pair(entries$e.zw, inverse.zw));
                        }
#end
                    }
#else
                    for (var i = local; i < PASS_PAIRS * BLOCK_ENTRIES; i += 256u) {
                        let head = pass_head + i / BLOCK_ENTRIES * WAYS;
                        let at = block * DIGITS * 16u + i % BLOCK_ENTRIES;
#ifdef PAIRS
                        lookup[i] = vec2<f32>(table_entry(table_row, head, at), table_entry(table_row, head + 1u, at));
#else
                        lookup[i] = table_entry(table_row, head, at);
#endif
                    }
#endif
                    workgroupBarrier();
                }
                for (var w = first_word; w < last_word; w++) {
#repeat i TOKENS
                    var codes$i = next$i;
                    next$i = index_pages[index_at + min(w + 1u, last_word - 1u) * PAGE + $iu * 256u];
#end
                    var at = (w * TABLES_PER_WORD - block) * DIGITS * 16u;
                    // Tables past the last have zero entries.
                    for (var t = 0u; t < TABLES_PER_WORD; t++) {
#repeat i TOKENS
                        {
                            let code = codes$i & CODE_MASK;
                            codes$i = codes$i >> PLANES;
#ifdef COARSE
                            let looked = lookup[at + (code & 15u)];
#ifdef PRODUCT
                            var value0 = unpack2x16float(looked.x);
                            var value1 = unpack2x16float(looked.y);
                            for (var d = 1u; d < DIGITS; d++) {
                                let factor = lookup[at + d * 16u + ((code >> (d * 4u)) & 15u)];
                                value0 *= unpack2x16float(factor.x);
                                value1 *= unpack2x16float(factor.y);
                            }
                            sum0_$i += value0;
                            sum1_$i += value1;
#else
                            units$i += looked;
                            for (var d = 1u; d < DIGITS; d++) {
                                units$i += lookup[at + d * 16u + ((code >> (d * 4u)) & 15u)];
                            }
#endif
#else
#repeat g PASS_PAIRS
                            {
                                let base = at + $gu * BLOCK_ENTRIES;
#ifdef PRODUCT
                                var value = lookup[base + (code & 15u)];
                                for (var d = 1u; d < DIGITS; d++) {
                                    value *= lookup[base + d * 16u + ((code >> (d * 4u)) & 15u)];
                                }
                                sum$g_$i += value;
#else
                                for (var d = 0u; d < DIGITS; d++) {
                                    sum$g_$i += lookup[base + d * 16u + ((code >> (d * 4u)) & 15u)];
                                }
#endif
                            }
#end
#endif
                        }
#end
                        at += DIGITS * 16u;
                    }
                }
            }
#ifdef MEAN_SCORE
#repeat g PASS_PAIRS
            for (var way = 0u; way < WAYS; way++) {
                if pass_head + $gu * WAYS + way < SCORING_HEADS {
#repeat i TOKENS
                    mean$i += gain$i * part(sum$g_$i, way) + bias$i;
#end
                }
            }
#end
            if pass_head + HEADS_PER_PASS < SCORING_HEADS {
                continue;
            }
#endif
#ifdef COARSE
#ifndef PRODUCT
#repeat i TOKENS
            sum0_$i = coarse_sums(units$i.x);
            sum1_$i = coarse_sums(units$i.y);
#end
#endif
#endif
            // The scores of one head, by its place in the pass.
            for (var h = 0u; h < pass_heads; h++) {
#ifdef MEAN_SCORE
                let score_head = 0u;
#else
                let score_head = pass_head + h;
#endif
                let range = ranges[h];
                let scores_at = p.header + row.score_base + (kv_head * SCORE_ROWS + score_head) * score_stride(row.visible);
#repeat i TOKENS
                {
                    let token = first + local + $iu * 256u;
                    if local + $iu * 256u < CHUNK && token < row.visible {
#ifdef MEAN_SCORE
                        let score = mean$i * (1.0 / f32(SCORING_HEADS));
#else
                        var looked = sum0_$i;
#repeat g PASS_PAIRS
                        looked = select(looked, sum$g_$i, h / WAYS == $gu);
#end
                        var sum = part(looked, h % WAYS);
#ifdef COARSE
#ifndef PRODUCT
                        sum *= range.unit;
#endif
#endif
                        let score = gain$i * sum + (bias$i + range.shift);
#endif
                        let key = order_key(score);
                        scores[scores_at + token] = key;
#ifdef DISJOINT
                        let contested = !in_base(row, token);
#else
                        let contested = true;
#endif
                        if contested {
                            let bin = order_bin(key, range.low, range.inverse_width);
                            let half = bin / COUNT_WORDS * 16u;
                            atomicAdd(&counts[h * COUNT_WORDS + bin % COUNT_WORDS], 1u << half);
                        }
                    }
                }
#end
            }
        }
        workgroupBarrier();
        let score_row = (block_row * KV_HEADS + kv_head) * SCORE_ROWS + select(pass_head, 0u, SCORE_ROWS == 1u);
        for (var i = local; i < pass_heads * COUNT_WORDS; i += 256u) {
            let count = atomicLoad(&counts[i]);
            let at = (score_row + i / COUNT_WORDS) * HISTOGRAM_ROW + i % COUNT_WORDS;
            if (count & 0xffffu) > 0u {
                atomicAdd(&histogram[at], count & 0xffffu);
            }
            if count >> 16u > 0u {
                atomicAdd(&histogram[at + COUNT_WORDS], count >> 16u);
            }
        }
    }
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    // `max_count` chunks of the list of pages, a workgroup's tables and counts serve those of one sequence.
    let token_index = p.first_token + index % p.tokens;
    let kv_head = index / p.tokens % KV_HEADS;
    let first_unit = index / (p.tokens * KV_HEADS) * p.max_count;
    let last_unit = min(first_unit + p.max_count, p.entries * UNITS);
    for (var run = first_unit; run < last_unit;) {
        let run_end = end_of_run(run, last_unit);
        score_run(local, token_index, kv_head, run, run_end);
        run = run_end;
    }
}
