#import output
// Stores two neighbouring results in `out`, or the first of them: rows of 16-bit elements have an even length.
fn store(at: u32, x: f32, y: f32, both: bool) {
#ifdef OUT_F32
    out[at] = bitcast<u32>(x);
    if both {
        out[at + 1u] = bitcast<u32>(y);
    }
#else
    out[at >> 1u] = pack_pair(x, y);
#endif
}
