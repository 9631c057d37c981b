// Weights of 32 rows, of 32 keys each; `row8` has the rows row8 * 4 .. + 4.
var<workgroup> weights: array<f32, 1024>;

fn weights_of(row8: u32, key: u32) -> vec4<f32> {
    return vec4<f32>(
        weights[(row8 * 4u) * 32u + key],
        weights[(row8 * 4u + 1u) * 32u + key],
        weights[(row8 * 4u + 2u) * 32u + key],
        weights[(row8 * 4u + 3u) * 32u + key]);
}
