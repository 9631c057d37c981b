// Tiled products of 64 rows by 64 columns. Operands stand in panels: 16 steps of the sum by 64 rows or columns, four to
// a vector. Invocation (row4, column4) owns rows row4 * 4 .. + 4 and columns column4 * 4 .. + 4. Vectors are permuted
// within a step, so that neither filling along steps nor along rows meets few memory banks only.
var<workgroup> panels: array<vec4<f32>, 1024>;

// Sums of four rows, with four columns each.
struct Block {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
}
alias Sums = Block;

fn panel_at(panel: u32, step: u32, four: u32) -> u32 {
    return panel * 256u + step * 16u + (four ^ step);
}

// One number of a panel.
fn set_panel(panel: u32, step: u32, place: u32, x: f32) {
    panels[panel_at(panel, step, place >> 2u)][place & 3u] = x;
}

// Four numbers of a step.
fn set_four(panel: u32, step: u32, four: u32, x: vec4<f32>) {
    panels[panel_at(panel, step, four)] = x;
}

fn get_four(panel: u32, step: u32, four: u32) -> vec4<f32> {
    return panels[panel_at(panel, step, four)];
}

// Puts vectors aside in place of panels, to be added up.
fn park(panel: u32, step: u32, four: u32, x: vec4<f32>) {
    panels[panel_at(panel, step, four)] = x;
}

fn parked_one(panel: u32, step: u32, place: u32) -> f32 {
    return panels[panel_at(panel, step, place >> 2u)][place & 3u];
}

// Sum over the steps of what is parked.
fn parked_sum(panel: u32, four: u32) -> vec4<f32> {
    var sum = vec4<f32>();
    for (var step = p.zero; step < 16u; step++) {
        sum += panels[panel_at(panel, step, four)];
    }
    return sum;
}

fn greatest_of(x: vec4<f32>) -> f32 {
    let y = abs(x);
    return max(max(y.x, y.y), max(y.z, y.w));
}

fn greatest_of_block(x: Block) -> f32 {
    return max(max(greatest_of(x.a), greatest_of(x.b)), max(greatest_of(x.c), greatest_of(x.d)));
}

// Rows that a sum's owner has: the first and the last.
fn first_row_of(local: u32) -> u32 {
    return local / 16u * 4u;
}

fn last_row_of(local: u32) -> u32 {
    return local / 16u * 4u + 3u;
}

fn add_product(sums: Block, left: vec4<f32>, right: vec4<f32>) -> Block {
    return Block(
        sums.a + left.x * right,
        sums.b + left.y * right,
        sums.c + left.z * right,
        sums.d + left.w * right);
}

// Adds the product of two panels.
fn add_panels(sums: ptr<function, Sums>, local: u32, left: u32, right: u32) {
    var s = *sums;
    for (var k = p.zero; k < 16u; k += 4u) {
#repeat u 4
        s = add_product(s, panels[panel_at(left, k + $uu, local / 16u)], panels[panel_at(right, k + $uu, local % 16u)]);
#end
    }
    *sums = s;
}

// An invocation's own rows and columns, divided by the scale; all invocations come here together.
fn block_of(sums: ptr<function, Sums>, local: u32, scale: f32) -> Block {
    return *sums;
}

// The scale of operands, which needs none here.
fn scale_of(local: u32, x: f32) -> f32 {
    return 1.0;
}

fn scale_sums(sums: ptr<function, Sums>, x: f32) {
}
