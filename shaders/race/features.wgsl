#import hash
// Bucket weights of 32 tokens in a tile of 32 buckets, from t = tanh(w·x) in the kernel's own `t`.
//
// A tile is 32 / R whole tables, or a part of one. σ(±2βt) of the planes it needs is computed once per token; a weight
// is a product of PLANES of them.
const TILE_TABLES: u32 = max(1u, 32u >> PLANES);
const TILE_PLANES: u32 = TILE_TABLES * PLANES;
// Rows of 33, so that neither reading along tokens nor along planes meets one memory bank only.
var<workgroup> odds: array<vec2<f32>, TILE_PLANES * 33u>;

// Of `count` tokens whose rows of t start at `at` and lie `stride` apart, for the tile from bucket `first` on. Barriers
// are the caller's.
fn fill_odds(local: u32, at: u32, stride: u32, count: u32, first: u32, beta: f32) {
    let first_plane = (first >> PLANES) * PLANES;
    for (var i = local; i < 32u * TILE_PLANES; i += 256u) {
        let token = i / TILE_PLANES;
        let plane = i % TILE_PLANES;
        var z = 0.0;
        if token < count && first_plane + plane < BITS {
            z = 2.0 * beta * t[at + token * stride + first_plane + plane];
        }
        odds[plane * 33u + token] = logistic_pair(z);
    }
}

// α = R·φ − c of bucket `first + bucket` of the tile; 0 past the last bucket.
fn alpha_of(first: u32, bucket: u32, token: u32, centre: f32) -> f32 {
    let code = first + bucket;
    let table = ((code >> PLANES) - (first >> PLANES)) * PLANES;
    var weight = 1.0;
    for (var plane = 0u; plane < PLANES; plane++) {
        let pair = odds[(table + plane) * 33u + token];
        weight *= 2.0 * select(pair.x, pair.y, ((code >> (PLANES - 1u - plane)) & 1u) == 1u);
    }
    return select(0.0, weight - centre, code < BUCKETS);
}
