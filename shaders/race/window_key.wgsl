#import window_params
#import window_keys
#import tile
#import square_weights
// Adds the window's part of dk and dv: one workgroup per (kv head, tile of 32 keys, sequence). With RING the keys are
// those before the call, and what they get belongs to the gradient of the ring.
#ifdef RING
@group(0) @binding(4) var<storage, read> kept: array<f32>;
@group(0) @binding(5) var<storage, read_write> grads: array<f32>;
#else
@group(0) @binding(5) var<storage, read> kept: array<f32>;
@group(0) @binding(6) var<storage, read_write> dk: array<f32>;
@group(0) @binding(7) var<storage, read_write> dv: array<f32>;
#endif

// Channels of one invocation: every 32nd.
const OWN: u32 = (HEAD_DIM + 31u) / 32u;
const OWN_VALUES: u32 = (VALUE_DIM + 31u) / 32u;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let tiles = (p.tokens + 31u) / 32u;
    let kv_head = index % KV_HEADS;
    let b = index / KV_HEADS / tiles;
    let past = i32(past_of(b));
    let length = i32(length_of(b));
    let column = local % 32u;
    let row8 = local / 32u;
    // Positions of the first key and of the end of the keys.
#ifdef RING
    let first = i32(index / KV_HEADS % tiles * 32u) - past;
    let end = 0;
#else
    let first = i32(p.first + index / KV_HEADS % tiles * 32u);
    let end = i32(end_of(b));
#endif
    var of_keys: array<vec4<f32>, OWN>;
    var of_values: array<vec4<f32>, OWN_VALUES>;
    for (var i = 0u; i < OWN; i++) {
        of_keys[i] = vec4<f32>();
    }
    for (var i = 0u; i < OWN_VALUES; i++) {
        of_values[i] = vec4<f32>();
    }
    // Queries that see any of the keys, as (token, head of the group) pairs from `first_token` on.
    let first_token = max(first, 0);
    let last_token = min(min(first + 32, end) - 1 + i32(p.window) - 1, length - 1);
    var queries = 0u;
    if first < end {
        queries = u32(max(last_token + 1 - first_token, 0)) * GROUP;
    }
    for (var query = 0u; query < queries; query += 32u) {
        let token = u32(first_token) + (query + column) / GROUP;
        var logits = vec4<f32>();
        for (var slice = 0u; slice < HEAD_DIM; slice += 32u) {
            let channel = slice + column;
            workgroupBarrier();
            var x = vec4<f32>();
            for (var i = 0u; i < 4u; i++) {
                let position = first + i32(row8 * 4u + i);
                if channel < HEAD_DIM && position < end {
                    x[i] = key_element(b, position, kv_head, channel);
                }
            }
            left[left_at(column, row8)] = x;
            for (var i = row8; i < 32u; i += 8u) {
                var y = 0.0;
                if channel < HEAD_DIM && query + i < queries {
                    let of_query = u32(first_token) + (query + i) / GROUP - p.in_first;
                    y = input_element(input_at(b, of_query, kv_head * GROUP + (query + i) % GROUP) + channel);
                }
                right[square_at(column, i)] = y;
            }
            workgroupBarrier();
            logits += square_product(row8, column);
        }
        var slopes = vec4<f32>();
        for (var slice = 0u; slice < VALUE_DIM; slice += 32u) {
            let channel = slice + column;
            workgroupBarrier();
            var x = vec4<f32>();
            for (var i = 0u; i < 4u; i++) {
                let position = first + i32(row8 * 4u + i);
                if channel < VALUE_DIM && position < end {
                    x[i] = value_element(b, position, kv_head, channel);
                }
            }
            left[left_at(column, row8)] = x;
            for (var i = row8; i < 32u; i += 8u) {
                var y = 0.0;
                if channel < VALUE_DIM && query + i < queries {
                    y = kept[keep_of(b, u32(first_token), query + i, kv_head) + channel];
                }
                right[square_at(column, i)] = y;
            }
            workgroupBarrier();
            slopes += square_product(row8, column);
        }
        var lse = 0.0;
        var mean = 0.0;
        if query + column < queries {
            let at = keep_of(b, u32(first_token), query + column, kv_head) + VALUE_DIM;
            lse = kept[at];
            mean = kept[at + 1u];
        }
        for (var r = 0u; r < 4u; r++) {
            let position = first + i32(row8 * 4u + r);
            let seen = query + column < queries && position < end && position <= i32(token)
                && position > i32(token) - i32(p.window);
            let weight = exp2(min(logits[r] * (p.scale * LOG2_E) - lse, 0.0));
            logits[r] = select(0.0, weight, seen);
            weights[(row8 * 4u + r) * 32u + column] = logits[r];
        }
        slopes = logits * (slopes - mean) * p.scale;
        workgroupBarrier();
        let count = min(32u, queries - query);
        for (var i = 0u; i < OWN_VALUES; i++) {
            let channel = column + i * 32u;
            if channel < VALUE_DIM {
                for (var j = 0u; j < count; j++) {
                    of_values[i] += kept[keep_of(b, u32(first_token), query + j, kv_head) + channel] * weights_of(row8, j);
                }
            }
        }
        workgroupBarrier();
        for (var r = 0u; r < 4u; r++) {
            weights[(row8 * 4u + r) * 32u + column] = slopes[r];
        }
        workgroupBarrier();
        for (var i = 0u; i < OWN; i++) {
            let channel = column + i * 32u;
            if channel < HEAD_DIM {
                for (var j = 0u; j < count; j++) {
                    let of_query = u32(first_token) + (query + j) / GROUP - p.in_first;
                    let at = input_at(b, of_query, kv_head * GROUP + (query + j) % GROUP) + channel;
                    of_keys[i] += input_element(at) * weights_of(row8, j);
                }
            }
        }
    }
    for (var r = 0u; r < 4u; r++) {
        let position = first + i32(row8 * 4u + r);
        if position < end {
#ifdef RING
            let row = grads_row(b, position, kv_head);
#else
            let row = (u32(position) - p.first) * KV_HEADS + kv_head;
#endif
            for (var i = 0u; i < OWN; i++) {
                let channel = column + i * 32u;
                if channel < HEAD_DIM {
#ifdef RING
                    grads[row + channel] += of_keys[i][r];
#else
                    dk[p.out_at + b * p.out_batch + row * HEAD_DIM + channel] += of_keys[i][r];
#endif
                }
            }
            for (var i = 0u; i < OWN_VALUES; i++) {
                let channel = column + i * 32u;
                if channel < VALUE_DIM {
#ifdef RING
                    grads[row + HEAD_DIM + channel] += of_values[i][r];
#else
                    dv[p.out2_at + b * p.out2_batch + row * VALUE_DIM + channel] += of_values[i][r];
#endif
                }
            }
        }
    }
}

// What is kept of the query that stands `query` (token, head of the group) pairs after a token.
fn keep_of(b: u32, first_token: u32, query: u32, kv_head: u32) -> u32 {
    return keep_row(b, first_token + query / GROUP, kv_head * GROUP + query % GROUP);
}
#ifdef RING

// The row of a position in the gradient of the ring, bound from `out_at` on.
fn grads_row(b: u32, position: i32, kv_head: u32) -> u32 {
    return p.out_at + ((b * p.window + slot_of(b, position)) * KV_HEADS + kv_head) * RING_ROW;
}
#endif
