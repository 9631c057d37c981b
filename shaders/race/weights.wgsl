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

// The numbers of a row of t that four buckets from a multiple of four on take: they share all planes but the last two.
// Loaded before they are needed, they are there when they are.
struct Hashes {
    a: vec4<f32>,
    b: vec4<f32>,
}

fn hashes_at(row: u32, bucket: u32) -> Hashes {
    let table = bucket >> PLANES;
    var x: Hashes;
    if PLANES == 1u {
        x.a.x = t[row + min(table, TABLES - 1u)];
        x.a.y = t[row + min(table + 1u, TABLES - 1u)];
        return x;
    }
    let first = row + min(table, TABLES - 1u) * PLANES;
    x.a.x = t[first];
    x.a.y = t[first + 1u];
    if PLANES > 2u {
        x.a.z = t[first + 2u];
    }
    if PLANES > 3u {
        x.a.w = t[first + 3u];
    }
    if PLANES > 4u {
        x.b = vec4<f32>(
            t[first + 4u],
            t[first + min(5u, max(PLANES, 1u) - 1u)],
            t[first + min(6u, max(PLANES, 1u) - 1u)],
            t[first + min(7u, max(PLANES, 1u) - 1u)]);
    }
    return x;
}

fn hash_of(x: Hashes, plane: u32) -> f32 {
    if PLANES > 4u {
        return select(x.a, x.b, plane > 3u)[plane & 3u];
    }
    return x.a[plane & 3u];
}

// Weights of these buckets.
fn alphas_of(x: Hashes, bucket: u32, beta: f32, centre: f32) -> vec4<f32> {
    var weights: vec4<f32>;
    if PLANES == 1u {
        weights = 2.0 * vec4<f32>(logistic_pair(2.0 * beta * x.a.x), logistic_pair(2.0 * beta * x.a.y));
    } else {
        var upper = 4.0;
        for (var plane = 0u; plane + 2u < PLANES; plane++) {
            let pair = logistic_pair(2.0 * beta * hash_of(x, plane));
            upper *= 2.0 * select(pair.x, pair.y, ((bucket >> (PLANES - 1u - plane)) & 1u) == 1u);
        }
        let a = logistic_pair(2.0 * beta * hash_of(x, max(PLANES, 2u) - 2u));
        let b = logistic_pair(2.0 * beta * hash_of(x, PLANES - 1u));
        weights = upper * vec4<f32>(a.x * b, a.y * b);
    }
    let buckets = vec4<u32>(bucket) + vec4<u32>(0u, 1u, 2u, 3u);
    return select(vec4<f32>(), weights - centre, buckets < vec4<u32>(BUCKETS));
}

fn alpha_of_four(row: u32, bucket: u32, beta: f32, centre: f32) -> vec4<f32> {
    return alphas_of(hashes_at(row, bucket), bucket, beta, centre);
}
