// Sums in pairs of f32 (high, low), good for 48 bits.
//
// Compilers with fast mathematics would simplify the error terms to nothing: every intermediate passes through an
// exclusive-or with a uniform that is zero.
fn opaque(x: f32) -> f32 {
    return bitcast<f32>(bitcast<u32>(x) ^ p.zero);
}

fn two_sum(a: f32, b: f32) -> vec2<f32> {
    let sum = opaque(a + b);
    let of_b = opaque(sum - a);
    let of_a = opaque(sum - of_b);
    let lost_a = opaque(a - of_a);
    let lost_b = opaque(b - of_b);
    return vec2<f32>(sum, lost_a + lost_b);
}

fn double_add(a: vec2<f32>, b: vec2<f32>) -> vec2<f32> {
    let high = two_sum(a.x, b.x);
    let low = two_sum(a.y, b.y);
    let first = two_sum(high.x, opaque(high.y + low.x));
    return two_sum(first.x, opaque(first.y + low.y));
}

// x / n for an n of at most 12 bits.
fn double_over(x: vec2<f32>, n: u32) -> vec2<f32> {
    let d = f32(n);
    let quotient = opaque(x.x / d);
    // In two halves, whose products with n are exact.
    let upper = bitcast<f32>(bitcast<u32>(quotient) & 0xfffff000u);
    let lower = opaque(quotient - upper);
    let rest = opaque(opaque(x.x - opaque(upper * d)) - opaque(lower * d));
    return two_sum(quotient, (rest + x.y) / d);
}
