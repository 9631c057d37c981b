// Parameters of every kernel; the Rust twin is `Params` in src/socket/gpu/params.rs.
struct Params {
    groups: u32,
    group_width: u32,
    batch: u32,
    tq: u32,
    entries: u32,
    first_entry: u32,
    slab: u32,
    max_count: u32,
    scale: f32,
    beta: f32,
    planes_stride: u32,
    items: u32,
    in_offset: u32,
    in_batch: u32,
    in_token: u32,
    in_head: u32,
    in2_offset: u32,
    in2_batch: u32,
    in2_token: u32,
    in2_head: u32,
    sink: u32,
    window: u32,
    header: u32,
    width: u32,
    first_row: u32,
    row_shift: u32,
    tokens: u32,
    first_token: u32,
}
@group(0) @binding(0) var<uniform> p: Params;

// Grids fold past 65,535 workgroups: x is `group_width` wide, and the last row may hold idle groups.
fn group_index(group: vec3<u32>) -> u32 {
    return group.y * p.group_width + group.x;
}
