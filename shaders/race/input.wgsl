#import elements
// An input of a kernel, `[batch, token, head, channel]` by strides: the first, or with the word 2 the second.
@group(0) @binding(INPUT$n) var<storage, read> input$n: array<u32>;

fn input$n_at(b: u32, token: u32, head: u32) -> u32 {
    return p.in$n_offset + b * p.in$n_batch + token * p.in$n_token + head * p.in$n_head;
}

// The word that holds an element, and the element of a word.
fn input$n_word(at: u32) -> u32 {
#ifdef IN$n_F32
    return at;
#else
    return at >> 1u;
#endif
}

fn element$n_of(word: u32, at: u32) -> f32 {
#ifdef IN$n_F32
    return finite_or_zero(word);
#endif
#ifdef IN$n_BF16
    return bf16_element(word, at);
#endif
#ifdef IN$n_F16
    return f16_element(word, at);
#endif
}

fn input$n_element(at: u32) -> f32 {
    return element$n_of(input$n[input$n_word(at)], at);
}
