#import elements
// The second input of a kernel, as the first; where it stands is the kernel's.
@group(0) @binding(INPUT2) var<storage, read> input2: array<u32>;

fn input2_at(b: u32, token: u32, head: u32) -> u32 {
    return p.in2_offset + b * p.in2_batch + token * p.in2_token + head * p.in2_head;
}

fn input2_element(at: u32) -> f32 {
#ifdef IN2_F32
    return finite_or_zero(input2[at]);
#endif
#ifdef IN2_BF16
    return bf16_element(input2[at >> 1u], at);
#endif
#ifdef IN2_F16
    return f16_element(input2[at >> 1u], at);
#endif
}
