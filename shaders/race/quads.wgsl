#import quad
// The first input of a kernel, `[batch, token, head, channel]` by strides, read four channels at a time. With WIDE all
// rows begin at multiples of four elements, and have whole fours.
#ifdef WIDE
#ifdef IN_F32
@group(0) @binding(2) var<storage, read> input: array<vec4<u32>>;
#else
@group(0) @binding(2) var<storage, read> input: array<vec2<u32>>;
#endif
#else
@group(0) @binding(2) var<storage, read> input: array<u32>;
#endif

fn input_at(b: u32, token: u32, head: u32) -> u32 {
    return p.in_offset + b * p.in_batch + token * p.in_token + head * p.in_head;
}

// Channels from `channel` on of the row at `at`; zero past the `channels` that a row has.
fn input_quad(at: u32, channel: u32, channels: u32) -> vec4<f32> {
    var x = vec4<f32>();
#ifdef WIDE
    if channel < channels {
#ifdef IN_F32
        x = quad_f32(input[(at + channel) >> 2u]);
#endif
#ifdef IN_BF16
        x = quad_bf16(input[(at + channel) >> 2u]);
#endif
#ifdef IN_F16
        x = quad_f16(input[(at + channel) >> 2u]);
#endif
    }
#else
    for (var i = p.zero; i < 4u; i++) {
        if channel + i < channels {
            let place = at + channel + i;
#ifdef IN_F32
            x[i] = finite_or_zero(input[place]);
#endif
#ifdef IN_BF16
            x[i] = bf16_element(input[place >> 1u], place);
#endif
#ifdef IN_F16
            x[i] = f16_element(input[place >> 1u], place);
#endif
        }
    }
#endif
    return x;
}
