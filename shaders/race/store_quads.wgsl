#import output
// Stores four neighbouring results at a time. With WIDE_OUT all rows begin at multiples of four elements, and have whole
// fours.
#ifdef WIDE_OUT
#ifdef OUT_F32
@group(0) @binding(OUT) var<storage, read_write> out: array<vec4<f32>>;
#else
@group(0) @binding(OUT) var<storage, read_write> out: array<vec2<u32>>;
#endif
#else
@group(0) @binding(OUT) var<storage, read_write> out: array<u32>;
#endif

// Channels from `channel` on of the row at `at`, up to the `channels` that a row has.
fn store_quad(at: u32, channel: u32, channels: u32, x: vec4<f32>) {
    let place = at + channel;
#ifdef WIDE_OUT
    if channel < channels {
#ifdef OUT_F32
        out[place >> 2u] = x;
#else
        out[place >> 2u] = vec2<u32>(pack_pair(x.x, x.y), pack_pair(x.z, x.w));
#endif
    }
#else
#ifdef OUT_F32
    for (var i = p.zero; i < 4u; i++) {
        if channel + i < channels {
            out[place + i] = bitcast<u32>(x[i]);
        }
    }
#else
    // Rows of 16-bit elements have an even length.
    if channel < channels {
        out[place >> 1u] = pack_pair(x.x, x.y);
    }
    if channel + 2u < channels {
        out[(place >> 1u) + 1u] = pack_pair(x.z, x.w);
    }
#endif
#endif
}

#ifdef OUT_F32
fn stored_quad(at: u32, channel: u32, channels: u32) -> vec4<f32> {
    var x = vec4<f32>();
    let place = at + channel;
#ifdef WIDE_OUT
    if channel < channels {
        x = out[place >> 2u];
    }
#else
    for (var i = p.zero; i < 4u; i++) {
        if channel + i < channels {
            x[i] = bitcast<f32>(out[place + i]);
        }
    }
#endif
    return x;
}
#endif
