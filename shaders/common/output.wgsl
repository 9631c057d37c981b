// Rounding of results to 16-bit dtypes, to nearest, ties to even; WGSL leaves the rounding of its own packing open.
fn round_bf16(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return (bits >> 16u) | 0x40u;
    }
    return (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
}

fn round_half(x: f32) -> u32 {
    let bits = bitcast<u32>(x);
    let sign = (bits >> 16u) & 0x8000u;
    let magnitude = bits & 0x7fffffffu;
    if magnitude > 0x7f800000u {
        return sign | 0x7e00u;
    }
    // 65520 and above round to infinity.
    if magnitude >= 0x477ff000u {
        return sign | 0x7c00u;
    }
    if magnitude < 0x38800000u {
        // Below the smallest normal half: adding 0.5 lines the mantissa up and rounds as the hardware does.
        let aligned = bitcast<f32>(magnitude) + 0.5;
        return sign | (bitcast<u32>(aligned) - 0x3f000000u);
    }
    let rounded = magnitude + 0xfffu + ((magnitude >> 13u) & 1u);
    return sign | ((rounded - 0x38000000u) >> 13u);
}

fn pack_pair(a: f32, b: f32) -> u32 {
#ifdef OUT_BF16
    return round_bf16(a) | (round_bf16(b) << 16u);
#else
    return round_half(a) | (round_half(b) << 16u);
#endif
}
