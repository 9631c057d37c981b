#import params
#import hash
#import double
// Adds the shares that hash_parameters made to the sums of a whole backward, pairs of f32
// `[set, ENSEMBLES, BITS, HEAD_DIM + 1]`: an invocation per element. `slots` is the number of sets, 1 or one per kv head,
// `chunks` that of shares, `out_at` the ensemble's first element in a set.
@group(0) @binding(2) var<storage, read> shares: array<f32>;
@group(0) @binding(3) var<storage, read_write> totals: array<vec2<f32>>;

const ROW: u32 = HEAD_DIM + 1u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let element = index * 256u + local;
    let one = BITS * ROW;
    let which = element / one;
    // Heads that share a set add to it in turn.
    let sets = select(1u, p.heads, p.slots > 1u);
    if which >= sets {
        return;
    }
    let first = select(0u, which, p.slots > 1u);
    let last = select(p.heads, which + 1u, p.slots > 1u);
    let at = select(0u, p.head + which, p.slots > 1u) * ENSEMBLES * one + p.out_at + element % one;
    var sum = totals[at];
    for (var head = first; head < last; head++) {
        for (var share = 0u; share < p.chunks; share++) {
            sum = double_add(sum, vec2<f32>(shares[(share * p.heads + head) * one + element % one], 0.0));
        }
    }
    totals[at] = sum;
}
