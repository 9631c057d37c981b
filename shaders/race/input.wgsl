#import elements
// The first input of a kernel, `[batch, token, head, channel]` by strides.
@group(0) @binding(2) var<storage, read> input: array<u32>;

fn input_at(b: u32, token: u32, head: u32) -> u32 {
    return p.in_offset + b * p.in_batch + token * p.in_token + head * p.in_head;
}

// The word that holds an element, and the element of a word.
fn input_word(at: u32) -> u32 {
#ifdef IN_F32
    return at;
#else
    return at >> 1u;
#endif
}

fn element_of(word: u32, at: u32) -> f32 {
#ifdef IN_F32
    return finite_or_zero(word);
#endif
#ifdef IN_BF16
    return bf16_element(word, at);
#endif
#ifdef IN_F16
    return f16_element(word, at);
#endif
}

fn input_element(at: u32) -> f32 {
    return element_of(input[input_word(at)], at);
}
