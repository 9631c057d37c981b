// Four neighbouring channels of `matrices`, whose binding is the importing text's: some kernels write it too.
fn stored_matrix_quad(at: u32, channel: u32) -> vec4<f32> {
    var x = vec4<f32>();
#ifdef QUADS
    if channel < VALUE_DIM {
        x = matrices[(at + channel) >> 2u];
    }
#else
    for (var i = p.zero; i < 4u; i++) {
        if channel + i < VALUE_DIM {
            x[i] = matrices[at + channel + i];
        }
    }
#endif
    return x;
}
