// A tiled matrix product: 32 rows by WIDTH columns, with `left` holding 32 steps and `right` DEPTH steps of the sum.
// Invocation (row8, column) owns rows row8 * 4 .. + 4 and every 32nd column from `column` on. Both are permuted so that
// neither filling nor reading meets one memory bank only.
const WIDTH: u32 = COLUMNS * 32u;
const DEPTH: u32 = 1024u / WIDTH;
var<workgroup> left: array<vec4<f32>, 256>;
var<workgroup> right: array<f32, 1024>;

fn left_at(step: u32, row8: u32) -> u32 {
    return step * 8u + (row8 ^ (step & 7u));
}

fn right_at(step: u32, column: u32) -> u32 {
    return step * WIDTH + (column ^ ((step * COLUMNS) & 31u));
}

// As `right_at` where `right` holds 32 steps of 32 columns.
fn square_at(step: u32, column: u32) -> u32 {
    return step * 32u + (column ^ step);
}

fn square_product(row8: u32, column: u32) -> vec4<f32> {
    var sum = vec4<f32>();
    for (var k = p.zero; k < 32u; k += 4u) {
#repeat u 4
        sum += left[left_at(k + $uu, row8)] * right[square_at(k + $uu, column)];
#end
    }
    return sum;
}

// Sum over the 32 columns, for the rows of this invocation.
fn sum_of_columns(row8: u32, column: u32, value: vec4<f32>) -> vec4<f32> {
    workgroupBarrier();
    left[left_at(column, row8)] = value;
    workgroupBarrier();
    var sum = vec4<f32>();
    for (var k = p.zero; k < 32u; k++) {
        sum += left[left_at(k, row8)];
    }
    return sum;
}
