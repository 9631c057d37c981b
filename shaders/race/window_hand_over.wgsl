#import window_params
#import window_last
// What the gradient of the ring after a call holds for the call's own tokens goes to their dk and dv, one element for
// each invocation; what is left is of the tokens before.
@group(0) @binding(2) var<storage, read_write> ring: array<f32>;
@group(0) @binding(3) var<storage, read_write> dk: array<f32>;
@group(0) @binding(4) var<storage, read_write> dv: array<f32>;

const ROW: u32 = HEAD_DIM + VALUE_DIM;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let place = place_of(index * 256u + local, ROW);
    if !place.is_inside {
        return;
    }
    let b = place.b;
    let token = place.token;
    let kv_head = place.kv_head;
    let channel = place.piece;
    let source = ring_row(b, i32(token), kv_head) + channel;
    let row = (token - p.first) * KV_HEADS + kv_head;
    if channel < HEAD_DIM {
        dk[p.out_at + b * p.out_batch + row * HEAD_DIM + channel] += ring[source];
    } else {
        dv[p.out2_at + b * p.out2_batch + row * VALUE_DIM + channel - HEAD_DIM] += ring[source];
    }
    ring[source] = 0.0;
}
