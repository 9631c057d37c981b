#import window_params
#import reduce
// The gates' gradients out of `tokens` shares of each query head: one workgroup per gate, of which there are `flags`.
@group(0) @binding(2) var<storage, read> shares: array<f32>;
@group(0) @binding(3) var<storage, read_write> out: array<f32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let gate = group_index(group);
    if gate >= p.groups {
        return;
    }
    var sum = 0.0;
    for (var i = local; i < p.tokens * Q_HEADS / p.flags; i += 256u) {
        sum += shares[i * p.flags + gate];
    }
    let total = reduce_sum(local, sum);
    if local == 0u {
        out[gate] = total;
    }
}
