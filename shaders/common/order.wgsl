// Scores as integers of the same order. NaN ranks lowest of all; zero has one form; 0 is kept for "no key".
fn order_key(score: f32) -> u32 {
    let bits = bitcast<u32>(score);
    if (bits & 0x7fffffffu) > 0x7f800000u {
        return 1u;
    }
    if (bits & 0x7fffffffu) == 0u {
        return 0x80000000u;
    }
    return select(bits | 0x80000000u, ~bits, (bits >> 31u) == 1u);
}

fn order_score(key: u32) -> f32 {
    return bitcast<f32>(select(~key, key & 0x7fffffffu, key >= 0x80000000u));
}

// The first digit of the radix selection: a linear bin between the row's bounds. Every kernel bins the stored key,
// never the score at hand, so that all of them agree to the bit.
fn order_bin(key: u32, low: f32, inverse_width: f32) -> u32 {
    if key <= 1u {
        return 0u;
    }
    let at = (order_score(key) - low) * inverse_width;
    return u32(clamp(at, 0.0, f32(BINS - 1u)));
}
