// Parameters of every kernel of the window; the Rust twin is `WindowParams` in src/race/gpu/window_kernels.rs.
//
// A dispatch works on tokens `first` to `first + tokens` of the call, for `batch` sequences. The first input begins at
// token `in_first`, keys and values at `in2_first`.
struct Params {
    groups: u32,
    group_width: u32,
    batch: u32,
    tokens: u32,
    first: u32,
    in_first: u32,
    in2_first: u32,
    flags: u32,
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
    out2_at: u32,
    out2_batch: u32,
    ring_at: u32,
    keep_at: u32,
    keep_batch: u32,
    scale: f32,
    zero: u32,
    window: u32,
    reserved_a: u32,
    reserved_b: u32,
}
@group(0) @binding(0) var<uniform> p: Params;
#import info
// After the tokens of each sequence in the whole call: the tokens before it that its window reaches, the slot of its
// first token, and then the gate of every query head.
fn past_of(b: u32) -> u32 {
    return info[p.batch + b];
}

fn slot_of(b: u32, position: i32) -> u32 {
    let first = info[2u * p.batch + b];
    if position < 0 {
        return (first + p.window - u32(-position)) % p.window;
    }
    return (first + u32(position)) % p.window;
}

fn gate_of(head: u32) -> f32 {
    return bitcast<f32>(info[3u * p.batch + head]);
}

// The end of the dispatch's tokens of a sequence.
fn end_of(b: u32) -> u32 {
    return min(length_of(b), p.first + p.tokens);
}

// A ring is `[sequence, slot, kv head, RING_ROW]`: the channels of k, then those of v.
const RING_ROW: u32 = (HEAD_DIM + VALUE_DIM + 1u) / 2u * 2u;

fn ring_row(b: u32, position: i32, kv_head: u32) -> u32 {
    return p.ring_at + ((b * p.window + slot_of(b, position)) * KV_HEADS + kv_head) * RING_ROW;
}

// Rows of what a backward pass keeps, `[sequence, token, query head, KEEP_ROW]`: g·grad_o, lse in base 2, and
// g·grad_o·o_window. The first pass over them leaves o_window in the place of g·grad_o.
const KEEP_ROW: u32 = VALUE_DIM + 2u;

fn keep_row(b: u32, token: u32, head: u32) -> u32 {
    return p.keep_at + b * p.keep_batch + ((token - p.in_first) * Q_HEADS + head) * KEEP_ROW;
}

const LOG2_E: f32 = 1.4426950408889634;
