#import quad
// The second input of a kernel, as the first; where it stands is the kernel's. With WIDE2 all
// rows begin at multiples of four elements, and have whole fours.
#ifdef WIDE2
#ifdef IN2_F32
@group(0) @binding(INPUT2) var<storage, read> input2: array<vec4<u32>>;
#else
@group(0) @binding(INPUT2) var<storage, read> input2: array<vec2<u32>>;
#endif
#else
@group(0) @binding(INPUT2) var<storage, read> input2: array<u32>;
#endif

fn input2_at(b: u32, token: u32, head: u32) -> u32 {
    return p.in2_offset + b * p.in2_batch + token * p.in2_token + head * p.in2_head;
}

// Channels from `channel` on of the row at `at`; zero past the `channels` that a row has.
fn input2_quad(at: u32, channel: u32, channels: u32) -> vec4<f32> {
    var x = vec4<f32>();
#ifdef WIDE2
    if channel < channels {
#ifdef IN2_F32
        x = quad_f32(input2[(at + channel) >> 2u]);
#endif
#ifdef IN2_BF16
        x = quad_bf16(input2[(at + channel) >> 2u]);
#endif
#ifdef IN2_F16
        x = quad_f16(input2[(at + channel) >> 2u]);
#endif
    }
#else
    for (var i = p.zero; i < 4u; i++) {
        if channel + i < channels {
            let place = at + channel + i;
#ifdef IN2_F32
            x[i] = finite_or_zero(input2[place]);
#endif
#ifdef IN2_BF16
            x[i] = bf16_element(input2[place >> 1u], place);
#endif
#ifdef IN2_F16
            x[i] = f16_element(input2[place >> 1u], place);
#endif
        }
    }
#endif
    return x;
}
