#import tanh
// From the gradient of bucket weights to that of β·t: with m = tanh(β·t), s_p = Σ_r dφ_r·φ_r·(c_rp − m_p), per table,
// in tiles of 32 buckets. A constant added to dφ over a table changes nothing.
const RADIX: u32 = 1u << PLANES;
const SPAN: u32 = min(RADIX, 32u);
const TILE_TABLES: u32 = 32u / SPAN;
// (Σ signed, Σ) of a table wider than a tile, for two rows, in up to two streams.
var<private> carried: array<vec4<f32>, 2>;

// `value` is dφ·φ of this invocation's rows and column in the tile from bucket `start` on. Writes s of finished
// tables: row `r` of the tile at `at + r * stride`, for `rows` rows.
fn through_hash(local: u32, stream: u32, start: u32, value: vec4<f32>, at: u32, stride: u32, t_at: u32, t_stride: u32, rows: u32, beta: f32) {
    workgroupBarrier();
    left[left_at(local % 32u, local / 32u)] = value;
    workgroupBarrier();
    let slot = local % 16u;
    let in_tile = slot / PLANES;
    let plane = slot % PLANES;
    let table = (start >> PLANES) + in_tile;
    if in_tile >= TILE_TABLES || table >= TABLES {
        return;
    }
    var sums4 = vec4<f32>();
    if (start & (RADIX - 1u)) != 0u {
        sums4 = carried[stream];
    }
    let row = local / 16u;
    for (var i = p.zero; i < SPAN; i++) {
        let column = in_tile * SPAN + i;
        let a = left[left_at(column, row / 4u)][row % 4u];
        let b = left[left_at(column, row / 4u + 4u)][row % 4u];
        let sign = select(-1.0, 1.0, (((start + column) >> (PLANES - 1u - plane)) & 1u) == 1u);
        sums4 += vec4<f32>(sign * a, a, sign * b, b);
    }
    carried[stream] = sums4;
    if ((start + SPAN) & (RADIX - 1u)) == 0u || SPAN == RADIX {
        let index = table * PLANES + plane;
        if row < rows {
            s[at + row * stride + index] = sums4.x - bounded_tanh(beta * t[t_at + row * t_stride + index]) * sums4.y;
        }
        if row + 16u < rows {
            let m = bounded_tanh(beta * t[t_at + (row + 16u) * t_stride + index]);
            s[at + (row + 16u) * stride + index] = sums4.z - m * sums4.w;
        }
    }
}
