#import params
#import rows
#import order
#import find_bin
// The exact threshold of a row, as (key, last token): a key is selected if it is larger, or equal at or before that
// token. One workgroup per score row; eight bits at a time over (key, then lower token first).
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> tables: array<f32>;
@group(0) @binding(3) var<storage, read_write> scores: array<u32>;
@group(0) @binding(4) var<storage, read> histogram: array<u32>;
@group(0) @binding(5) var<storage, read> candidates: array<u32>;

const TABLE_ROW: u32 = 4u + ENTRIES;
var<workgroup> digits: array<atomic<u32>, 256>;
var<workgroup> chosen: u32;
var<workgroup> chosen_above: u32;

fn histogram_read(at: u32) -> u32 {
    return histogram[at];
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let score_row = index;
    let head = score_row % (KV_HEADS * SCORE_ROWS);
    let row = rows[p.first_row + score_row / (KV_HEADS * SCORE_ROWS)];
    let histogram_at = score_row * HISTOGRAM_ROW;
    let found = find_bin(local, histogram_at, max(row.heavy, 1u));
    if row.heavy == 0u || row.heavy >= row.visible || found.total <= row.heavy {
        if local == 0u {
            scores[score_row * 2u] = select(0u, 0xffffffffu, row.heavy == 0u);
            scores[score_row * 2u + 1u] = select(0xffffffffu, 0u, row.heavy == 0u);
        }
        return;
    }
    let header = (score_row / SCORE_ROWS * SCORING_HEADS + score_row % SCORE_ROWS) * TABLE_ROW;
    let low = tables[header];
    let inverse_width = tables[header + 1u];
    let scores_at = p.header + row.score_base + head * score_stride(row.visible);
    let listed = histogram[histogram_at + BINS];
    let whole = listed > CANDIDATES;
    let count = select(listed, row.visible, whole);
    var wanted = row.heavy - found.above;

    var key_prefix = 0u;
    var token_prefix = 0u;
    for (var round = 0u; round < 8u; round++) {
        let shift = 24u - (round & 3u) * 8u;
        // Bits above the current digit; none in the first round of each half.
        let mask = select(0xffffffffu << (shift + 8u), 0u, (round & 3u) == 0u);
        workgroupBarrier();
        atomicStore(&digits[local], 0u);
        workgroupBarrier();
        for (var i = local; i < count; i += 256u) {
            var key: u32;
            var token: u32;
            var valid = true;
            if whole {
                key = scores[scores_at + i];
                token = i;
                valid = order_bin(key, low, inverse_width) == found.bin;
#ifdef DISJOINT
                valid = valid && !in_base(row, token);
#endif
            } else {
                key = candidates[(score_row * CANDIDATES + i) * 2u];
                token = candidates[(score_row * CANDIDATES + i) * 2u + 1u];
            }
            if round < 4u {
                if valid && (key & mask) == (key_prefix & mask) {
                    atomicAdd(&digits[(key >> shift) & 255u], 1u);
                }
            } else if valid && key == key_prefix && (~token & mask) == (token_prefix & mask) {
                atomicAdd(&digits[(~token >> shift) & 255u], 1u);
            }
        }
        workgroupBarrier();
        // Invocation 0 owns the largest digit.
        let own = atomicLoad(&digits[255u - local]);
        let upto = inclusive_scan(local, own);
        if upto >= wanted && upto - own < wanted {
            chosen = 255u - local;
            chosen_above = upto - own;
        }
        workgroupBarrier();
        wanted -= chosen_above;
        if round < 4u {
            key_prefix |= chosen << shift;
        } else {
            token_prefix |= chosen << shift;
        }
    }
    if local == 0u {
        scores[score_row * 2u] = key_prefix;
        scores[score_row * 2u + 1u] = ~token_prefix;
    }
}
