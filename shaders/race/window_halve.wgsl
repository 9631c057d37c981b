#import window_params
#import input
// Parts the gradient of o between the halves: one workgroup per (query head, 64 tokens, sequence). `input` is grad_o;
// (1 − g)·grad_o takes the place of RACE's o, and g·grad_o that of the window's. The gates' gradients are left in shares,
// one for each workgroup.
@group(0) @binding(3) var<storage, read_write> race: array<f32>;
@group(0) @binding(4) var<storage, read_write> kept: array<f32>;
@group(0) @binding(5) var<storage, read_write> shares: array<f32>;

var<workgroup> parts: array<vec2<f32>, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let blocks = (p.tokens + 63u) / 64u;
    let head = index % Q_HEADS;
    let first = p.first + index / Q_HEADS % blocks * 64u;
    let b = index / Q_HEADS / blocks;
    let end = end_of(b);
    let gate = gate_of(head);
    let column = local % 32u;
    let row8 = local / 32u;
    var total = 0.0;
    for (var i = 0u; i < 64u; i += 8u) {
        let token = first + i + row8;
        let row = keep_row(b, token, head);
        // grad_o·o_window and grad_o·o_race.
        var products = vec2<f32>();
        if token < end {
            let of_race = p.out2_at + b * p.out2_batch + ((token - p.first) * Q_HEADS + head) * VALUE_DIM;
            let of_grad = input_at(b, token - p.in_first, head);
            for (var channel = column; channel < VALUE_DIM; channel += 32u) {
                let g = input_element(of_grad + channel);
                products += g * vec2<f32>(kept[row + channel], race[of_race + channel]);
                kept[row + channel] = gate * g;
                race[of_race + channel] = (1.0 - gate) * g;
            }
        }
        workgroupBarrier();
        parts[local] = products;
        for (var step = 16u; step > 0u; step = step >> 1u) {
            workgroupBarrier();
            if column < step {
                parts[local] += parts[local + step];
            }
        }
        if column == 0u && token < end {
            kept[row + VALUE_DIM + 1u] = gate * parts[local].x;
            total += parts[local].x - parts[local].y;
        }
    }
    workgroupBarrier();
    parts[local] = vec2<f32>(total, 0.0);
    workgroupBarrier();
    if local == 0u {
        for (var i = 32u; i < 256u; i += 32u) {
            total += parts[i].x;
        }
        shares[p.out_at + index] = total;
    }
}
