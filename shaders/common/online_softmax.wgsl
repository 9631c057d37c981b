#import square_weights
// Softmax of 32 rows over keys that come 32 at a time: `weights` holds logits in base 2, MASKED where a row does not see
// a key, and then weights relative to the largest logit so far, with `keeps` the factors of what was summed before.
const MASKED: f32 = -1e30;
var<workgroup> peaks: array<f32, 32>;
var<workgroup> sums: array<f32, 32>;
var<workgroup> keeps: array<f32, 32>;

fn soften(row: u32) {
    var top = peaks[row];
    for (var i = 0u; i < 32u; i++) {
        top = max(top, weights[row * 32u + i]);
    }
    let keep = exp2(peaks[row] - top);
    var sum = 0.0;
    for (var i = 0u; i < 32u; i++) {
        let logit = weights[row * 32u + i];
        let weight = select(exp2(logit - top), 0.0, logit <= MASKED);
        weights[row * 32u + i] = weight;
        sum += weight;
    }
    keeps[row] = keep;
    peaks[row] = top;
    sums[row] = sums[row] * keep + sum;
}

fn keeps_of(row8: u32) -> vec4<f32> {
    return vec4<f32>(keeps[row8 * 4u], keeps[row8 * 4u + 1u], keeps[row8 * 4u + 2u], keeps[row8 * 4u + 3u]);
}
