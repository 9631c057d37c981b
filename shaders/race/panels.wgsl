// Tiled products of 64 rows by 64 columns. Operands stand in panels: 16 steps of the sum by 64 rows or columns, four to
// a vector. Invocation (row4, column4) owns rows row4 * 4 .. + 4 and columns column4 * 4 .. + 4. Neighbours in a pair have
// one column4, so that the hardware reads for both at once. Vectors are permuted within a step, so that neither filling
// along steps nor along rows meets few memory banks only: alike in the four steps of a quad, which stand FOUR_STEPS apart.
var<workgroup> panels: array<vec4<f32>, 1024>;

// Sums of four rows, with four columns each.
struct Block {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
}

const PANEL: u32 = 256u;
const FOUR_STEPS: u32 = 16u;

fn row4_of(local: u32) -> u32 {
    return local / 32u * 2u + local % 2u;
}

fn column4_of(local: u32) -> u32 {
    return local / 2u % 16u;
}

// Where the first of four steps stands.
fn quad_at(panel: u32, quad: u32, four: u32) -> u32 {
    return panel * PANEL + quad * 64u + (four ^ (quad * 2u));
}

fn panel_at(panel: u32, step: u32, four: u32) -> u32 {
    return quad_at(panel, step / 4u, four) + step % 4u * FOUR_STEPS;
}

// One number of a panel.
fn set_panel(panel: u32, step: u32, place: u32, x: f32) {
    panels[panel_at(panel, step, place >> 2u)][place & 3u] = x;
}

// Four steps' numbers of a row or column.
fn set_row(panel: u32, row: u32, quad: u32, x: vec4<f32>) {
    for (var i = 0u; i < 4u; i++) {
        set_panel(panel, quad * 4u + i, row, x[i]);
    }
}

// Columns as steps: a block's sums by its four columns, from `step` on, rows four to a vector.
fn set_block(panel: u32, step: u32, row4: u32, x: Block) {
    panels[panel_at(panel, step, row4)] = vec4<f32>(x.a.x, x.b.x, x.c.x, x.d.x);
    panels[panel_at(panel, step + 1u, row4)] = vec4<f32>(x.a.y, x.b.y, x.c.y, x.d.y);
    panels[panel_at(panel, step + 2u, row4)] = vec4<f32>(x.a.z, x.b.z, x.c.z, x.d.z);
    panels[panel_at(panel, step + 3u, row4)] = vec4<f32>(x.a.w, x.b.w, x.c.w, x.d.w);
}

// Sum over the steps of a panel.
fn panel_sum(panel: u32, four: u32) -> vec4<f32> {
    var sum = vec4<f32>();
    for (var step = p.zero; step < 16u; step++) {
        sum += panels[panel_at(panel, step, four)];
    }
    return sum;
}

fn add_product(sums: Block, left: vec4<f32>, right: vec4<f32>) -> Block {
    return Block(
        sums.a + left.x * right,
        sums.b + left.y * right,
        sums.c + left.z * right,
        sums.d + left.w * right);
}
