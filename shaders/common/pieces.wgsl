// Stored rows of k and v are read in pieces of 16 bytes: four f32, or eight 16-bit elements as two vec4.
#ifdef KV_F32
fn piece_low(piece: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(piece);
}
#endif
#ifdef KV_BF16
fn piece_low(piece: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(piece.x << 16u, piece.x & 0xffff0000u, piece.y << 16u, piece.y & 0xffff0000u));
}
fn piece_high(piece: vec4<u32>) -> vec4<f32> {
    return bitcast<vec4<f32>>(vec4<u32>(piece.z << 16u, piece.z & 0xffff0000u, piece.w << 16u, piece.w & 0xffff0000u));
}
#endif
#ifdef KV_F16
fn piece_low(piece: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(piece.x), unpack2x16float(piece.y));
}
fn piece_high(piece: vec4<u32>) -> vec4<f32> {
    return vec4<f32>(unpack2x16float(piece.z), unpack2x16float(piece.w));
}
#endif
