enable f16;
enable wgpu_cooperative_matrix;
// As `panels`, by cooperative matrices of 16 by 16: an operand is the sum of two halves (f16), some 22 bits of it, so
// kernels scale what they put into panels to where a half has its full precision. The eight subgroups of 32 own 16 rows
// and 32 columns each.
const PANEL: u32 = 288u;
// All panels' upper halves, then the lower ones; a step is padded against bank conflicts.
var<workgroup> panels: array<vec4<f16>, PANEL * 8u>;
var<workgroup> staging: array<vec4<f32>, 1088>;
var<workgroup> greatest: array<f32, 8>;

// Sums of four rows, with four columns each.
struct Block {
    a: vec4<f32>,
    b: vec4<f32>,
    c: vec4<f32>,
    d: vec4<f32>,
}
struct Sums {
    a: coop_mat16x16<f32, C>,
    b: coop_mat16x16<f32, C>,
}

fn panel_at(panel: u32, step: u32, four: u32) -> u32 {
    return panel * PANEL + step * 18u + four;
}

fn set_panel(panel: u32, step: u32, place: u32, x: f32) {
    let at = panel_at(panel, step, place >> 2u);
    let upper = f16(x);
    panels[at][place & 3u] = upper;
    panels[at + PANEL * 4u][place & 3u] = f16(x - f32(upper));
}

fn set_four(panel: u32, step: u32, four: u32, x: vec4<f32>) {
    let at = panel_at(panel, step, four);
    let upper = vec4<f16>(x);
    panels[at] = upper;
    panels[at + PANEL * 4u] = vec4<f16>(x - vec4<f32>(upper));
}

fn get_four(panel: u32, step: u32, four: u32) -> vec4<f32> {
    let at = panel_at(panel, step, four);
    return vec4<f32>(panels[at]) + vec4<f32>(panels[at + PANEL * 4u]);
}

fn park(panel: u32, step: u32, four: u32, x: vec4<f32>) {
    staging[panel * 256u + step * 16u + (four ^ step)] = x;
}

fn parked_one(panel: u32, step: u32, place: u32) -> f32 {
    return staging[panel * 256u + step * 16u + ((place >> 2u) ^ step)][place & 3u];
}

fn parked_sum(panel: u32, four: u32) -> vec4<f32> {
    var sum = vec4<f32>();
    for (var step = p.zero; step < 16u; step++) {
        sum += staging[panel * 256u + step * 16u + (four ^ step)];
    }
    return sum;
}

fn first_row_of(local: u32) -> u32 {
    return local / 64u * 16u;
}

fn last_row_of(local: u32) -> u32 {
    return local / 64u * 16u + 15u;
}

fn greatest_of(x: vec4<f32>) -> f32 {
    let y = abs(x);
    return max(max(y.x, y.y), max(y.z, y.w));
}

fn greatest_of_block(x: Block) -> f32 {
    return max(max(greatest_of(x.a), greatest_of(x.b)), max(greatest_of(x.c), greatest_of(x.d)));
}

// A power of two that takes the greatest of all invocations' numbers to between 2^14 and 2^15.
fn scale_of(local: u32, x: f32) -> f32 {
    let most = subgroupMax(x);
    workgroupBarrier();
    if local % 32u == 0u {
        greatest[local / 32u] = most;
    }
    workgroupBarrier();
    var all = greatest[0];
    for (var i = 1u; i < 8u; i++) {
        all = max(all, greatest[i]);
    }
    let exponent = bitcast<u32>(all) >> 23u;
    return select(1.0, bitcast<f32>(clamp(268u - exponent, 67u, 187u) << 23u), exponent > 0u);
}

fn scale_sums(sums: ptr<function, Sums>, x: f32) {
    (*sums).a = (*sums).a * x;
    (*sums).b = (*sums).b * x;
}

fn add_panels(sums: ptr<function, Sums>, local: u32, left: u32, right: u32) {
    let row = panel_at(left, 0u, local / 64u * 4u);
    let column = panel_at(right, 0u, local / 32u % 2u * 8u);
    let x = coopLoad<coop_mat16x16<f16, A>>(&panels[row], 18u);
    let x_low = coopLoad<coop_mat16x16<f16, A>>(&panels[row + PANEL * 4u], 18u);
    let y = coopLoadT<coop_mat16x16<f16, B>>(&panels[column], 18u);
    let y_low = coopLoadT<coop_mat16x16<f16, B>>(&panels[column + PANEL * 4u], 18u);
    let z = coopLoadT<coop_mat16x16<f16, B>>(&panels[column + 4u], 18u);
    let z_low = coopLoadT<coop_mat16x16<f16, B>>(&panels[column + PANEL * 4u + 4u], 18u);
    (*sums).a = coopMultiplyAdd(x, y, coopMultiplyAdd(x_low, y, coopMultiplyAdd(x, y_low, (*sums).a)));
    (*sums).b = coopMultiplyAdd(x, z, coopMultiplyAdd(x_low, z, coopMultiplyAdd(x, z_low, (*sums).b)));
}

// An invocation's own rows and columns, divided by the scale; all invocations come here together.
fn block_of(sums: ptr<function, Sums>, local: u32, scale: f32) -> Block {
    let at = local / 64u * 16u * 17u + local / 32u % 2u * 8u;
    workgroupBarrier();
    coopStoreT((*sums).a, &staging[at], 17u);
    coopStoreT((*sums).b, &staging[at + 4u], 17u);
    workgroupBarrier();
    let own = local / 16u * 4u * 17u + local % 16u;
    let x = 1.0 / scale;
    let block = Block(x * staging[own], x * staging[own + 17u], x * staging[own + 34u], x * staging[own + 51u]);
    workgroupBarrier();
    return block;
}
