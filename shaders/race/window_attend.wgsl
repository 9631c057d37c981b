#import window_params
#import window_keys
#import tile
#import window_rows
#import online_softmax
// Exact attention of 32 query rows over their window: one workgroup per (kv head, tile, sequence). What it leaves is
// o mixed with RACE's, in the dtype asked for; or, with KEEP, o itself and lse for a backward pass.
#ifdef KEEP
@group(0) @binding(6) var<storage, read_write> kept: array<f32>;
#else
@group(0) @binding(6) var<storage, read> race: array<f32>;
@group(0) @binding(7) var<storage, read_write> out: array<u32>;
#import store
#endif

// Output channels of one invocation: every 32nd.
const OWN: u32 = (VALUE_DIM + 31u) / 32u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let rows = rows_of(index);
    let column = local % 32u;
    let row8 = local / 32u;
    var total: array<vec4<f32>, OWN>;
    for (var i = 0u; i < OWN; i++) {
        total[i] = vec4<f32>();
    }
    if local < 32u {
        peaks[local] = MASKED;
        sums[local] = 0.0;
    }
    for (var first = first_key(rows); first <= rows.last_token; first += 32) {
        let logits = logits_of(rows, first, row8, column);
        for (var r = 0u; r < 4u; r++) {
            let row = row8 * 4u + r;
            let seen = sees(token_of(rows, row), first + i32(column), rows.b);
            weights[row * 32u + column] = select(MASKED, logits[r] * (p.scale * LOG2_E), seen);
        }
        workgroupBarrier();
        if local < 32u {
            soften(local);
        }
        workgroupBarrier();
        let keep = keeps_of(row8);
        let count = u32(min(32, rows.last_token + 1 - first));
        for (var i = 0u; i < OWN; i++) {
            total[i] *= keep;
            let channel = column + i * 32u;
            if channel < VALUE_DIM {
                for (var j = 0u; j < count; j++) {
                    total[i] += value_element(rows.b, first + i32(j), rows.kv_head, channel) * weights_of(row8, j);
                }
            }
        }
    }
    // By way of the workgroup's memory, for each to store two neighbouring channels.
    for (var i = 0u; i < OWN; i++) {
        workgroupBarrier();
        for (var r = 0u; r < 4u; r++) {
            weights[(row8 * 4u + r) * 32u + column] = total[i][r];
        }
        workgroupBarrier();
        for (var j = local; j < 512u; j += 256u) {
            let row = j / 16u;
            let pair = j % 16u * 2u;
            let channel = i * 32u + pair;
            let token = token_of(rows, row);
            if token < rows.end && channel < VALUE_DIM {
                let head = head_of(rows, row);
                let both = channel + 1u < VALUE_DIM;
                var x = weights[row * 32u + pair] / sums[row];
                var y = weights[row * 32u + pair + 1u] / sums[row];
#ifdef KEEP
                let at = keep_row(rows.b, token, head) + channel;
                kept[at] = x;
                if both {
                    kept[at + 1u] = y;
                }
                if channel == 0u {
                    kept[at + VALUE_DIM] = peaks[row] + log2(sums[row]);
                }
#else
                let gate = gate_of(head);
                let at = ((token - p.first) * Q_HEADS + head) * VALUE_DIM + channel;
                let of_race = p.out2_at + rows.b * p.out2_batch + at;
                x = gate * x + (1.0 - gate) * race[of_race];
                if both {
                    y = gate * y + (1.0 - gate) * race[of_race + 1u];
                }
                store(p.out_at + rows.b * p.out_batch + at, x, y, both);
#endif
            }
        }
    }
}
