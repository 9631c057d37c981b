#import params
#import hash
#import double
// Gradients of hyperplanes and of β from their sums: one workgroup per 256 elements of the hyperplanes, then one per
// value of β. `slots` is the number of sets of sums, `chunks` that of hyperplanes, `heads` that of β.
@group(0) @binding(2) var<storage, read> totals: array<vec2<f32>>;
@group(0) @binding(3) var<storage, read_write> planes: array<f32>;
@group(0) @binding(4) var<storage, read_write> betas: array<f32>;

const ROW: u32 = HEAD_DIM + 1u;
const ALL_BITS: u32 = ENSEMBLES * BITS;
var<workgroup> parts: array<vec2<f32>, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let of_planes = p.groups - p.heads;
    if index < of_planes {
        let element = index * 256u + local;
        let which = element / (ALL_BITS * HEAD_DIM);
        if which >= p.chunks {
            return;
        }
        let first = select(0u, which, p.chunks > 1u);
        let last = select(p.slots, which + 1u, p.chunks > 1u);
        let bit = element / HEAD_DIM % ALL_BITS;
        var sum = vec2<f32>();
        for (var i = first; i < last; i++) {
            sum = double_add(sum, totals[(i * ALL_BITS + bit) * ROW + element % HEAD_DIM]);
        }
        planes[element] = sum.x + sum.y;
        return;
    }
    let beta = index - of_planes;
    let first = select(0u, beta, p.heads > 1u);
    let last = select(p.slots, beta + 1u, p.heads > 1u);
    var sum = vec2<f32>();
    for (var i = first * ALL_BITS + local; i < last * ALL_BITS; i += 256u) {
        sum = double_add(sum, totals[i * ROW + HEAD_DIM]);
    }
    parts[local] = sum;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step = step >> 1u) {
        if local < step {
            parts[local] = double_add(parts[local], parts[local + step]);
        }
        workgroupBarrier();
    }
    if local == 0u {
        betas[beta] = parts[0].x + parts[0].y;
    }
}
