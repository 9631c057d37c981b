#import elements
// The first input of a kernel, `[batch, token, head, channel]` by strides.
@group(0) @binding(2) var<storage, read> input: array<u32>;

fn input_at(b: u32, token: u32, head: u32) -> u32 {
    return p.in_offset + b * p.in_batch + token * p.in_token + head * p.in_head;
}

fn input_element(at: u32) -> f32 {
#ifdef IN_F32
    return finite_or_zero(input[at]);
#endif
#ifdef IN_BF16
    return bf16_element(input[at >> 1u], at);
#endif
#ifdef IN_F16
    return f16_element(input[at >> 1u], at);
#endif
}
