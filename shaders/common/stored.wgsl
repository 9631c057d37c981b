#import elements
// One element of a stored key or value row, by word.
fn stored_element(words: vec4<u32>, channel: u32) -> f32 {
#ifdef KV_F32
    return bitcast<f32>(words[channel & 3u]);
#endif
#ifdef KV_BF16
    let word = words[(channel >> 1u) & 3u];
    return bitcast<f32>(select(low_bf16(word), high_bf16(word), (channel & 1u) == 1u));
#endif
#ifdef KV_F16
    let word = words[(channel >> 1u) & 3u];
    return bitcast<f32>(widen_half((word >> ((channel & 1u) * 16u)) & 0xffffu));
#endif
}
#ifdef KV_F32
const PIECE: u32 = 4u;
#else
const PIECE: u32 = 8u;
#endif
