#import window_params
#import window_keys
#import tile
#import window_rows
#import square_weights
// Adds the window's part of dq: one workgroup per (kv head, tile of 32 query rows, sequence).
@group(0) @binding(6) var<storage, read> kept: array<f32>;
@group(0) @binding(7) var<storage, read_write> dq: array<f32>;

// Channels of one invocation: every 32nd.
const OWN: u32 = (HEAD_DIM + 31u) / 32u;

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
    // lse and the mean slope of each row.
    var lse = vec4<f32>();
    var mean = vec4<f32>();
    for (var r = 0u; r < 4u; r++) {
        let row = row8 * 4u + r;
        let token = token_of(rows, row);
        if token < rows.end {
            let at = keep_row(rows.b, token, head_of(rows, row)) + VALUE_DIM;
            lse[r] = kept[at];
            mean[r] = kept[at + 1u];
        }
    }
    for (var first = first_key(rows); first <= rows.last_token; first += 32) {
        let logits = logits_of(rows, first, row8, column);
        var slopes = vec4<f32>();
        for (var slice = 0u; slice < VALUE_DIM; slice += 32u) {
            let channel = slice + column;
            var x = vec4<f32>();
            if channel < VALUE_DIM {
                for (var i = 0u; i < 4u; i++) {
                    let row = row8 * 4u + i;
                    let token = token_of(rows, row);
                    if token < rows.end {
                        x[i] = kept[keep_row(rows.b, token, head_of(rows, row)) + channel];
                    }
                }
            }
            workgroupBarrier();
            left[left_at(column, row8)] = x;
            for (var i = row8; i < 32u; i += 8u) {
                var y = 0.0;
                if channel < VALUE_DIM && first + i32(i) <= rows.last_token {
                    y = value_element(rows.b, first + i32(i), rows.kv_head, channel);
                }
                right[square_at(column, i)] = y;
            }
            workgroupBarrier();
            slopes += square_product(row8, column);
        }
        for (var r = 0u; r < 4u; r++) {
            let row = row8 * 4u + r;
            let token = token_of(rows, row);
            let seen = token < rows.end && sees(token, first + i32(column), rows.b);
            let weight = exp2(min(logits[r] * (p.scale * LOG2_E) - lse[r], 0.0));
            weights[row * 32u + column] = select(0.0, weight * (slopes[r] - mean[r]) * p.scale, seen);
        }
        workgroupBarrier();
        let count = u32(min(32, rows.last_token + 1 - first));
        for (var i = 0u; i < OWN; i++) {
            let channel = column + i * 32u;
            if channel < HEAD_DIM {
                for (var j = 0u; j < count; j++) {
                    total[i] += key_element(rows.b, first + i32(j), rows.kv_head, channel) * weights_of(row8, j);
                }
            }
        }
    }
    for (var i = 0u; i < OWN; i++) {
        let channel = column + i * 32u;
        for (var r = 0u; r < 4u; r++) {
            let row = row8 * 4u + r;
            let token = token_of(rows, row);
            if token < rows.end && channel < HEAD_DIM {
                let at = ((token - p.first) * Q_HEADS + head_of(rows, row)) * HEAD_DIM + channel;
                dq[p.out_at + rows.b * p.out_batch + at] += total[i][r];
            }
        }
    }
}
