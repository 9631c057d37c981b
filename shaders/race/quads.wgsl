#import quad
// An input of a kernel, `[batch, token, head, channel]` by strides, read four channels at a time: the first, or with
// the word 2 the second. With WIDE$n all rows begin at multiples of four elements, and have whole fours.
#ifdef WIDE$n
#ifdef IN$n_F32
@group(0) @binding(INPUT$n) var<storage, read> input$n: array<vec4<u32>>;
#else
@group(0) @binding(INPUT$n) var<storage, read> input$n: array<vec2<u32>>;
#endif
#else
@group(0) @binding(INPUT$n) var<storage, read> input$n: array<u32>;
#endif

fn input$n_at(b: u32, token: u32, head: u32) -> u32 {
    return p.in$n_offset + b * p.in$n_batch + token * p.in$n_token + head * p.in$n_head;
}

// Channels from `channel` on of the row at `at`; zero past the `channels` that a row has.
fn input$n_quad(at: u32, channel: u32, channels: u32) -> vec4<f32> {
    var x = vec4<f32>();
#ifdef WIDE$n
    if channel < channels {
#ifdef IN$n_F32
        x = quad_f32(input$n[(at + channel) >> 2u]);
#endif
#ifdef IN$n_BF16
        x = quad_bf16(input$n[(at + channel) >> 2u]);
#endif
#ifdef IN$n_F16
        x = quad_f16(input$n[(at + channel) >> 2u]);
#endif
    }
#else
    for (var i = p.zero; i < 4u; i++) {
        if channel + i < channels {
            let place = at + channel + i;
#ifdef IN$n_F32
            x[i] = finite_or_zero(input$n[place]);
#endif
#ifdef IN$n_BF16
            x[i] = bf16_element(input$n[place >> 1u], place);
#endif
#ifdef IN$n_F16
            x[i] = f16_element(input$n[place >> 1u], place);
#endif
        }
    }
#endif
    return x;
}
