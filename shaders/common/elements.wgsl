// Elements of q, k, v in their own dtype, widened to f32.
fn is_finite_bits(bits: u32) -> bool {
    return (bits & 0x7f800000u) != 0x7f800000u;
}

// WGSL may assume that NaN and infinity do not occur, so they are told by their bits; they read as zero.
fn finite_or_zero(bits: u32) -> f32 {
    return bitcast<f32>(select(0u, bits, is_finite_bits(bits)));
}

fn low_bf16(word: u32) -> u32 {
    return word << 16u;
}

fn high_bf16(word: u32) -> u32 {
    return word & 0xffff0000u;
}

// IEEE half to single by integers, infinities and NaN kept as such.
fn widen_half(half: u32) -> u32 {
    let sign = (half & 0x8000u) << 16u;
    let exponent = (half >> 10u) & 0x1fu;
    let mantissa = half & 0x3ffu;
    if exponent == 0x1fu {
        return sign | 0x7f800000u | (mantissa << 13u);
    }
    if exponent == 0u {
        return sign | bitcast<u32>(f32(mantissa) * 5.9604644775390625e-8);
    }
    return sign | ((exponent + 112u) << 23u) | (mantissa << 13u);
}

// Element `at` of a row of 16-bit elements, out of the word that holds it.
fn bf16_element(word: u32, at: u32) -> f32 {
    return finite_or_zero(select(low_bf16(word), high_bf16(word), (at & 1u) == 1u));
}

fn f16_element(word: u32, at: u32) -> f32 {
    return finite_or_zero(widen_half((word >> ((at & 1u) * 16u)) & 0xffffu));
}
