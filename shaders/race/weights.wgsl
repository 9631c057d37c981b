#import hash
// Bucket weights α = R·φ − c straight from a row of t = tanh(w·x), for kernels whose workgroup memory is taken.
//
// Loops begin at a zero that compilers do not know, here and in other places that are not hot: unrolled, their
// exponentials take software drivers seconds to compile.

// Of one bucket; 0 past the last.
fn alpha_at(row: u32, bucket: u32, beta: f32, centre: f32) -> f32 {
    let first = row + min(bucket >> PLANES, TABLES - 1u) * PLANES;
    var weight = 1.0;
    for (var plane = p.zero; plane < PLANES; plane++) {
        let pair = logistic_pair(2.0 * beta * t[first + plane]);
        weight *= 2.0 * select(pair.x, pair.y, ((bucket >> (PLANES - 1u - plane)) & 1u) == 1u);
    }
    return select(0.0, weight - centre, bucket < BUCKETS);
}

// Of four buckets from a multiple of four on: they share all planes but the last two.
fn alpha_of_four(row: u32, bucket: u32, beta: f32, centre: f32) -> vec4<f32> {
    var weights: vec4<f32>;
    if PLANES == 1u {
        let table = bucket >> 1u;
        let a = logistic_pair(2.0 * beta * t[row + min(table, TABLES - 1u)]);
        let b = logistic_pair(2.0 * beta * t[row + min(table + 1u, TABLES - 1u)]);
        weights = 2.0 * vec4<f32>(a, b);
    } else {
        let first = row + min(bucket >> PLANES, TABLES - 1u) * PLANES;
        var upper = 4.0;
        for (var plane = p.zero; plane + 2u < PLANES; plane++) {
            let pair = logistic_pair(2.0 * beta * t[first + plane]);
            upper *= 2.0 * select(pair.x, pair.y, ((bucket >> (PLANES - 1u - plane)) & 1u) == 1u);
        }
        let last = first + max(PLANES, 2u) - 2u;
        let a = logistic_pair(2.0 * beta * t[last]);
        let b = logistic_pair(2.0 * beta * t[last + 1u]);
        weights = upper * vec4<f32>(a.x * b, a.y * b);
    }
    let buckets = vec4<u32>(bucket) + vec4<u32>(0u, 1u, 2u, 3u);
    return select(vec4<f32>(), weights - centre, buckets < vec4<u32>(BUCKETS));
}
