#import tile
// The sums of a tiled product.
var<private> sums: array<vec4<f32>, COLUMNS>;

fn clear_sums() {
#repeat c COLUMNS
    sums[$c] = vec4<f32>();
#end
}

// Adds DEPTH steps, those of `left` from `from` on.
fn add_products(row8: u32, column: u32, base: u32) {
    for (var k = p.zero; k < DEPTH; k += 4u) {
#repeat u 4
        let a$u = left[left_at(base + k + $uu, row8)];
#repeat c COLUMNS
        sums[$c] += a$u * right[right_at(k + $uu, column + $cu * 32u)];
#end
#end
    }
}
