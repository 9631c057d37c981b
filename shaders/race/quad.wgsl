#import elements
// Four neighbouring elements.
fn quad_f32(words: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(select(vec4<u32>(), words, (words & vec4<u32>(0x7f800000u)) != vec4<u32>(0x7f800000u)));
}

fn quad_bf16(words: vec2<u32>) -> vec4<f32> {
    return quad_f32(vec4<u32>(low_bf16(words.x), high_bf16(words.x), low_bf16(words.y), high_bf16(words.y)));
}

fn quad_f16(words: vec2<u32>) -> vec4<f32> {
    return quad_f32(vec4<u32>(
        widen_half(words.x & 0xffffu),
        widen_half(words.x >> 16u),
        widen_half(words.y & 0xffffu),
        widen_half(words.y >> 16u)));
}
