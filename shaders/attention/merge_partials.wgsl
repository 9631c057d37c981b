#import params
#import place
#import rows
#import output
#import reduce
// Merges the partial results of one query head: one workgroup per (row, query head, slice of the channels).
// Groups of LANES invocations take every MERGE_GROUPS-th partial, each invocation four channels; the groups then add up
// in order.
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> partials: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> o: array<u32>;
@group(0) @binding(4) var<storage, read_write> lse: array<u32>;

const MASKED: f32 = -1e30;
// Vectors of four channels, of which a workgroup merges LANES.
const WIDE: u32 = (VALUE_DIM + 3u) / 4u;
const LANES: u32 = (WIDE + MERGE_SPLIT - 1u) / MERGE_SPLIT;
const MERGE_GROUPS: u32 = 256u / LANES;
const VECS: u32 = PART_STRIDE / 4u;
// Partials weighed at a time, four by an invocation.
const BATCH: u32 = 1024u;
var<workgroup> scratch: array<vec4<f32>, 256>;
var<workgroup> weights: array<f32, BATCH>;

@compute @workgroup_size(256)
fn main(place: Place) {
    let local = local_of(place);
    let group = group_index(place.group);
    if group >= p.groups {
        return;
    }
    let index = p.first_row * Q_HEADS + group / MERGE_SPLIT;
    let slice = group % MERGE_SPLIT;
    let row = rows[p.row_shift + index / Q_HEADS];
    let first = row.part_base + index % Q_HEADS * row.part_count;
    var top = MASKED;
    for (var i = local; i < row.part_count; i += 4u * 256u) {
#repeat u 4
        let peak$u = partials[(first + min(i + $uu * 256u, row.part_count - 1u)) * VECS].x;
#end
        top = max(top, max(max(peak0, peak1), max(peak2, peak3)));
    }
    top = reduce_max(local, top);

    let vector = slice * LANES + local % LANES;
    let at = 1u + min(vector, WIDE - 1u);
    let merge_group = local / LANES;
    var value = vec4<f32>();
    var sum = 0.0;
    for (var base = 0u; base < row.part_count; base += BATCH) {
        // One invocation weighs each part; the groups then add up theirs, with eight loads under way.
        workgroupBarrier();
#repeat u 4
        {
            let part = base + local + $uu * 256u;
            let head = partials[(first + min(part, row.part_count - 1u)) * VECS];
            let weight = select(0.0, exp2(head.x - top), part < row.part_count && head.x > MASKED);
            weights[local + $uu * 256u] = weight;
            sum += select(0.0, head.y * weight, weight > 0.0);
        }
#end
        workgroupBarrier();
        if merge_group < MERGE_GROUPS {
            let count = min(BATCH, row.part_count - base);
            for (var i = merge_group; i < count; i += 8u * MERGE_GROUPS) {
#repeat u 8
                let part$u = i + $uu * MERGE_GROUPS;
                let weight$u = select(0.0, weights[min(part$u, count - 1u)], part$u < count);
                var values$u = vec4<f32>();
                if weight$u > 0.0 {
                    values$u = partials[(first + base + part$u) * VECS + at];
                }
#end
#repeat u 8
                value += values$u * weight$u;
#end
            }
        }
    }
    scratch[local] = value;
    // Its barriers serve `scratch` too.
    sum = reduce_sum(local, sum);
    if local < LANES && vector < WIDE {
        value = vec4<f32>();
        for (var g = 0u; g < MERGE_GROUPS; g++) {
            value += scratch[g * LANES + local];
        }
        value *= select(0.0, 1.0 / sum, sum > 0.0);
        let channel = vector * 4u;
#ifdef OUT_F32
        for (var c = 0u; c < 4u; c++) {
            if channel + c < VALUE_DIM {
                o[index * VALUE_DIM + channel + c] = bitcast<u32>(value[c]);
            }
        }
#else
        let word = (index * VALUE_DIM + channel) / 2u;
        o[word] = pack_pair(value.x, value.y);
        if channel + 2u < VALUE_DIM {
            o[word + 1u] = pack_pair(value.z, value.w);
        }
#endif
        if vector == 0u {
            // An empty key set has lse = -inf, written by its bits.
            let natural = (top + log2(max(sum, 1e-38))) * 0.6931471805599453;
            lse[index] = select(0xff800000u, bitcast<u32>(natural), sum > 0.0);
        }
    }
}
