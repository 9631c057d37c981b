#import params
#import rows
#import output
// Merges the partial results of one query head: one workgroup per (row, query head). Groups of LANES invocations take
// every MERGE_GROUPS-th partial, each invocation four channels; the groups then add up in order.
@group(0) @binding(1) var<storage, read> rows: array<Row>;
@group(0) @binding(2) var<storage, read> partials: array<vec4<f32>>;
@group(0) @binding(3) var<storage, read_write> o: array<u32>;
@group(0) @binding(4) var<storage, read_write> lse: array<u32>;

const MASKED: f32 = -1e30;
const LANES: u32 = (VALUE_DIM + 3u) / 4u;
const MERGE_GROUPS: u32 = 256u / LANES;
const VECS: u32 = PART_STRIDE / 4u;
var<workgroup> scratch: array<vec4<f32>, 256>;
var<workgroup> peaks: array<f32, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    if group_index(group) >= p.groups {
        return;
    }
    let index = p.first_row * Q_HEADS + group_index(group);
    let row = rows[p.row_shift + index / Q_HEADS];
    let first = row.part_base + index % Q_HEADS * row.part_count;
    var top = MASKED;
    for (var i = local; i < row.part_count; i += 256u) {
        top = max(top, partials[(first + i) * VECS].x);
    }
    peaks[local] = top;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step = step >> 1u) {
        if local < step {
            peaks[local] = max(peaks[local], peaks[local + step]);
        }
        workgroupBarrier();
    }
    top = peaks[0];

    let lane = local % LANES;
    let merge_group = local / LANES;
    var value = vec4<f32>();
    var sum = 0.0;
    if merge_group < MERGE_GROUPS {
        for (var i = merge_group; i < row.part_count; i += MERGE_GROUPS) {
            let head = partials[(first + i) * VECS];
            if head.x > MASKED {
                let weight = exp2(head.x - top);
                sum += head.y * weight;
                value += partials[(first + i) * VECS + 1u + lane] * weight;
            }
        }
    }
    workgroupBarrier();
    scratch[local] = value;
    peaks[local] = sum;
    workgroupBarrier();
    if local < LANES {
        value = vec4<f32>();
        sum = 0.0;
        for (var g = 0u; g < MERGE_GROUPS; g++) {
            value += scratch[g * LANES + local];
            sum += peaks[g * LANES + local];
        }
        let scale = select(0.0, 1.0 / sum, sum > 0.0);
        value *= scale;
#ifdef OUT_F32
        for (var c = 0u; c < 4u; c++) {
            if local * 4u + c < VALUE_DIM {
                o[index * VALUE_DIM + local * 4u + c] = bitcast<u32>(value[c]);
            }
        }
#else
        let at = (index * VALUE_DIM + local * 4u) / 2u;
        o[at] = pack_pair(value.x, value.y);
        if local * 4u + 2u < VALUE_DIM {
            o[at + 1u] = pack_pair(value.z, value.w);
        }
#endif
        if local == 0u {
            // An empty key set has lse = -inf, written by its bits.
            let natural = (top + log2(max(sum, 1e-38))) * 0.6931471805599453;
            lse[index] = select(0xff800000u, bitcast<u32>(natural), sum > 0.0);
        }
    }
}
