// Parameters of every kernel of RACE; the Rust twin is `Params` in src/race/gpu/params.rs.
//
// A dispatch works on a piece: `tokens` tokens of `batch` sequences, in `heads` kv heads from `head` on, in one
// ensemble. A unit is a (sequence, kv head) pair of the piece: `b * heads + h`.
struct Params {
    groups: u32,
    group_width: u32,
    batch: u32,
    tokens: u32,
    head: u32,
    heads: u32,
    chunks: u32,
    slots: u32,
    planes_at: u32,
    planes_stride: u32,
    q_at: u32,
    k_at: u32,
    in_offset: u32,
    in_batch: u32,
    in_token: u32,
    in_head: u32,
    in2_offset: u32,
    in2_batch: u32,
    in2_token: u32,
    in2_head: u32,
    in3_offset: u32,
    in3_batch: u32,
    in3_token: u32,
    in3_head: u32,
    out_at: u32,
    out_batch: u32,
    state_at: u32,
    flags: u32,
    scale: f32,
    zero: u32,
    parts_at: u32,
    reserved: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
// Tokens that each sequence of the piece has in it, then β and the centring constant of every kv head.
#import info

fn beta_of(kv_head: u32) -> f32 {
    return bitcast<f32>(info[p.batch + 2u * kv_head]);
}

fn centre_of(kv_head: u32) -> f32 {
    return bitcast<f32>(info[p.batch + 2u * kv_head + 1u]);
}
