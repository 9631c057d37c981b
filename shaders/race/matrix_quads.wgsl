// Matrices of runs and chunks, read four channels at a time.
#import matrices
#ifdef QUADS
@group(0) @binding(4) var<storage, read> matrices: array<vec4<f32>>;
#else
@group(0) @binding(4) var<storage, read> matrices: array<f32>;
#endif
#import stored_matrix

fn matrix_quad(sums: Sums, row: u32, channel: u32) -> vec4<f32> {
    var x = stored_matrix_quad(sums.run + row * MATRIX_ROW, channel);
    if sums.has_part {
        x += stored_matrix_quad(sums.part + row * MATRIX_ROW, channel);
    }
    return x;
}

fn stored_element(at: u32) -> f32 {
#ifdef QUADS
    return matrices[at >> 2u][at & 3u];
#else
    return matrices[at];
#endif
}

fn matrix_element(sums: Sums, row: u32, column: u32) -> f32 {
    var x = stored_element(sums.run + row * MATRIX_ROW + column);
    if sums.has_part {
        x += stored_element(sums.part + row * MATRIX_ROW + column);
    }
    return x;
}

// The last column of a row.
fn matrix_mass(sums: Sums, row: u32) -> f32 {
    return matrix_element(sums, row, VALUE_DIM);
}
