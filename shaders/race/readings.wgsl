// What backward_query left of a query, by its row: weights of products, and what multiplies the rows of the state.
#ifdef RATIO
// (scale / D, dD): a product G·v becomes the gradient of the query's own α.
fn reading_weight(row: u32) -> vec2<f32> {
    return vec2<f32>(readings[row * 2u], readings[row * 2u + 1u]);
}

// What gives the weights of four buckets, loaded before it is needed, and the weights.
alias Reading = Hashes;

fn reading_at(row: u32, bucket: u32) -> Reading {
    return hashes_at(p.q_at + row * BITS, bucket);
}

fn reading_of(x: Reading, bucket: u32, beta: f32, centre: f32) -> vec4<f32> {
    return alphas_of(x, bucket, beta, centre);
}

// What multiplies the state's row of sums.
fn reading_of_sums(row: u32, centre: f32) -> f32 {
    return centre * f32(BUCKETS);
}
#else
const READING: u32 = 2u * (BUCKETS + 1u);

fn reading_weight(row: u32) -> vec2<f32> {
    return vec2<f32>(p.scale, 0.0);
}

alias Reading = vec4<f32>;

fn reading_at(row: u32, bucket: u32) -> Reading {
    var x = vec4<f32>();
    for (var i = 0u; i < 4u; i++) {
        if bucket + i < BUCKETS {
            x[i] = readings[row * READING + bucket + i];
        }
    }
    return x;
}

fn reading_of(x: Reading, bucket: u32, beta: f32, centre: f32) -> vec4<f32> {
    return x;
}

fn reading_of_sums(row: u32, centre: f32) -> f32 {
    return readings[row * READING + BUCKETS];
}

// The gradient of masses that the query gives.
fn mass_of_four(row: u32, bucket: u32) -> vec4<f32> {
    var x = vec4<f32>();
    for (var i = 0u; i < 4u; i++) {
        if bucket + i < BUCKETS {
            x[i] = readings[row * READING + BUCKETS + 1u + bucket + i];
        }
    }
    return x;
}

fn mass_of_sums(row: u32) -> f32 {
    return readings[row * READING + 2u * BUCKETS + 1u];
}
#endif

fn reading_of_four(row: u32, bucket: u32, beta: f32, centre: f32) -> vec4<f32> {
    return reading_of(reading_at(row, bucket), bucket, beta, centre);
}
