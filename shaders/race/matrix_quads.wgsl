// Matrices of chunks, read four channels at a time.
#ifdef QUADS
@group(0) @binding(4) var<storage, read> matrices: array<vec4<f32>>;
#else
@group(0) @binding(4) var<storage, read> matrices: array<f32>;
#endif

fn matrix_quad(row_at: u32, channel: u32) -> vec4<f32> {
    var x = vec4<f32>();
#ifdef QUADS
    if channel < VALUE_DIM {
        x = matrices[(row_at + channel) >> 2u];
    }
#else
    for (var i = p.zero; i < 4u; i++) {
        if channel + i < VALUE_DIM {
            x[i] = matrices[row_at + channel + i];
        }
    }
#endif
    return x;
}

fn matrix_element(at: u32) -> f32 {
#ifdef QUADS
    return matrices[at >> 2u][at & 3u];
#else
    return matrices[at];
#endif
}

// The last column of a row.
fn matrix_mass(row_at: u32) -> f32 {
    return matrix_element(row_at + VALUE_DIM);
}
