#import params
#import rows
#import entries
#import query
#import stored
#import online_softmax
// Exact causal attention for many query tokens: one workgroup per (kv head, tile of QUERIES queries), over the page
// entries of one dispatch, of one sequence. A query is a (token, head of the group) pair. State (peak, sum, values) is carried from
// dispatch to dispatch in the partials, so that the work of one dispatch is bounded and pages may lie in any slab.
@group(0) @binding(2) var<storage, read> k_pages: array<vec4<u32>>;
@group(0) @binding(3) var<storage, read> v_pages: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> entries: array<Entry>;
@group(0) @binding(5) var<storage, read> rows: array<Row>;
@group(0) @binding(6) var<storage, read_write> partials: array<f32>;

const QUERIES: u32 = 32u;
const KEYS: u32 = 32u;
const SLICE: u32 = 32u;
// Output channels of one invocation: every 32nd.
const OWN: u32 = (VALUE_DIM + 31u) / 32u;
var<workgroup> query_slice: array<f32, 1024>;
var<workgroup> key_slice: array<f32, 1024>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let kv_head = index % KV_HEADS;
    let tile = p.max_count + index / KV_HEADS;
    let queries = p.tq * GROUP;
    let first_query = tile * QUERIES;
    let last_token = min(p.tq - 1u, (first_query + QUERIES - 1u) / GROUP);
    let reach = rows[last_token].visible;

    // Invocation (row8, column): rows row8 * 4 .. + 4 of the tile, columns of keys or channels at stride 32.
    let column = local % 32u;
    let row8 = local / 32u;
    var total: array<vec4<f32>, OWN>;
    for (var i = 0u; i < OWN; i++) {
        total[i] = vec4<f32>();
        if p.items == 1u {
            for (var r = 0u; r < 4u; r++) {
                let query = first_query + row8 * 4u + r;
                let channel = column + i * 32u;
                if query < queries && channel < VALUE_DIM {
                    let row = rows[query / GROUP];
                    let part = row.part_base + (kv_head * GROUP + query % GROUP) * row.part_count;
                    total[i][r] = partials[part * PART_STRIDE + 4u + channel];
                }
            }
        }
    }
    if local < QUERIES {
        peaks[local] = MASKED;
        sums[local] = 0.0;
        let query = first_query + local;
        if p.items == 1u && query < queries {
            let row = rows[query / GROUP];
            let part = row.part_base + (kv_head * GROUP + query % GROUP) * row.part_count;
            peaks[local] = partials[part * PART_STRIDE];
            sums[local] = partials[part * PART_STRIDE + 1u];
        }
    }
    workgroupBarrier();

    for (var e = 0u; e < p.entries; e++) {
        let entry = entries[p.first_entry + e];
        let page_row = (entry.page * KV_HEADS + kv_head) * PAGE;
        for (var key0 = 0u; key0 < PAGE && entry.logical * PAGE + key0 < reach; key0 += KEYS) {
            var logits = vec4<f32>();
            for (var slice = 0u; slice < HEAD_DIM; slice += SLICE) {
                workgroupBarrier();
                for (var i = local; i < 1024u; i += 256u) {
                    let channel = slice + i % 32u;
                    let query = first_query + i / 32u;
                    var a = 0.0;
                    var b = 0.0;
                    if channel < HEAD_DIM {
                        if query < queries {
                            a = query_element(0u, query / GROUP, kv_head * GROUP + query % GROUP, channel);
                        }
                        b = stored_element(k_pages[(page_row + key0 + i / 32u) * K_PIECES + channel / PIECE], channel % PIECE);
                    }
                    // Channel innermost for queries; key innermost for keys.
                    query_slice[i] = a;
                    key_slice[(i % 32u) * 32u + i / 32u] = b;
                }
                workgroupBarrier();
                for (var c = 0u; c < SLICE; c++) {
                    let b = key_slice[c * 32u + column];
                    logits.x += query_slice[(row8 * 4u) * 32u + c] * b;
                    logits.y += query_slice[(row8 * 4u + 1u) * 32u + c] * b;
                    logits.z += query_slice[(row8 * 4u + 2u) * 32u + c] * b;
                    logits.w += query_slice[(row8 * 4u + 3u) * 32u + c] * b;
                }
            }
            let key = entry.logical * PAGE + key0 + column;
            for (var r = 0u; r < 4u; r++) {
                let query = first_query + row8 * 4u + r;
                var seen = false;
                if query < queries {
                    seen = key < rows[query / GROUP].visible;
                }
                weights[(row8 * 4u + r) * 32u + column] = select(MASKED, logits[r] * (p.scale * 1.4426950408889634), seen);
            }
            workgroupBarrier();
            if local < QUERIES {
                soften(local);
            }
            workgroupBarrier();
            let keep = keeps_of(row8);
            for (var i = 0u; i < OWN; i++) {
                total[i] *= keep;
                let channel = column + i * 32u;
                if channel < VALUE_DIM {
                    for (var j = 0u; j < KEYS; j++) {
                        // Rows past the last visible key hold old or no tokens, all finite: their weight is zero.
                        let value = stored_element(v_pages[(page_row + key0 + j) * V_PIECES + channel / PIECE], channel % PIECE);
                        total[i] += value * weights_of(row8, j);
                    }
                }
            }
            workgroupBarrier();
        }
    }

    for (var i = 0u; i < OWN; i++) {
        for (var r = 0u; r < 4u; r++) {
            let query = first_query + row8 * 4u + r;
            let channel = column + i * 32u;
            if query < queries && channel < VALUE_DIM {
                let row = rows[query / GROUP];
                let part = row.part_base + (kv_head * GROUP + query % GROUP) * row.part_count;
                partials[part * PART_STRIDE + 4u + channel] = total[i][r];
            }
        }
    }
    if local < QUERIES {
        let query = first_query + local;
        if query < queries {
            let row = rows[query / GROUP];
            let part = row.part_base + (kv_head * GROUP + query % GROUP) * row.part_count;
            partials[part * PART_STRIDE] = peaks[local];
            partials[part * PART_STRIDE + 1u] = sums[local];
        }
    }
}
