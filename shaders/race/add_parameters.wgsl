#import params
#import hash
#import double
// Adds the shares that hash_parameters made to the sums of a whole backward, pairs of f32
// `[set, ENSEMBLES, BITS, HEAD_DIM + 1]`: one workgroup per 16 elements, 16 invocations to each. `slots` is the number of
// sets, 1 or one per kv head, `chunks` that of shares, `out_at` the ensemble's first element in a set.
@group(0) @binding(2) var<storage, read> shares: array<f32>;
@group(0) @binding(3) var<storage, read_write> totals: array<vec2<f32>>;

const ROW: u32 = HEAD_DIM + 1u;
var<workgroup> parts: array<vec2<f32>, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let element = index * 16u + local % 16u;
    let one = BITS * ROW;
    let which = element / one;
    // Heads that share a set all add to it.
    let sets = select(1u, p.heads, p.slots > 1u);
    let first = select(0u, which, p.slots > 1u);
    let heads = select(p.heads, 1u, p.slots > 1u);
    var sum = vec2<f32>();
    if which < sets {
        for (var i = local / 16u; i < heads * p.chunks; i += 16u) {
            let share = (i / heads * p.heads + first + i % heads) * one + element % one;
            sum = double_add(sum, vec2<f32>(shares[share], 0.0));
        }
    }
    parts[local] = sum;
    workgroupBarrier();
    for (var step = 128u; step >= 16u; step = step >> 1u) {
        if local < step {
            parts[local] = double_add(parts[local], parts[local + step]);
        }
        workgroupBarrier();
    }
    if local < 16u && which < sets {
        let at = select(0u, p.head + which, p.slots > 1u) * ENSEMBLES * one + p.out_at + element % one;
        totals[at] = double_add(totals[at], parts[local]);
    }
}
