#import params
#import input
#import features
#import matrix_quads
#import store
// Outputs of 32 queries of one query head: one workgroup per (unit, chunk,
// query head of the group, half of the chunk, block of channels).
//
// o = (Ψ·M + tril(Ψ·αᵀ)·[v, 1]) over the state before the chunk and the chunk's own keys. Ψ has a weight per bucket, in
// tiles of 32, and one for the last row, which is the same for every key:
//
// | | Ψ_s | Ψ_S | then |
// |---|---|---|---|
// | ratio | α_s | c·S | divided by the column of ones |
// | bucket | (α_s − c·δ_s) / F_s | c·Σ (α_s + c) / F_s | times a constant |
//
// where F_s = c·n + Σ α_k,s + R·ε is R times the bucket's mass at the query, and δ_s = F_s / n − 1: rows of values sum
// to zero over the buckets where c = 1, so a common part of the weights, which would drown the rest, is left out.
//
// Where c = 1 the values are taken from a constant row μ close to their mean, which all weights together bring back:
// what a query's weights make of the rest is not rounded with what is the same for all queries.
//
// With READ there are no keys, and one matrix a unit.
@group(0) @binding(3) var<storage, read> t: array<f32>;
@group(0) @binding(5) var<storage, read_write> out: array<u32>;
#ifdef SUMMED
// Sums over ensembles. FLAG 1 adds to what is there, FLAG 2 writes the result.
@group(0) @binding(6) var<storage, read_write> sums: array<f32>;
#endif

// Weights of queries 4i to 4i + 3 at `bucket * 9 + i`; later those of queries for keys; between, values to sum.
var<workgroup> weights: array<vec4<f32>, 288>;
#ifndef READ
// α of a key tile, at `bucket * 33 + key`.
var<workgroup> alphas: array<f32, 1056>;
#ifndef RATIO
var<workgroup> totals: array<f32, 256>;
#endif
#endif

// Sum over the 32 invocations that share four queries.
fn lane_sum(local: u32, value: vec4<f32>) -> vec4<f32> {
    workgroupBarrier();
    weights[local] = value;
    workgroupBarrier();
    for (var step = 16u; step > 0u; step = step >> 1u) {
        if local % 32u < step {
            weights[local] += weights[local + step];
        }
        workgroupBarrier();
    }
    return weights[local & 0xffffffe0u];
}

// α of this invocation's bucket for tokens 4i to 4i + 3, of 32 whose t begins at `at`.
fn alpha_tile(local: u32, at: u32, stride: u32, count: u32, first: u32, beta: f32, centre: f32) -> vec4<f32> {
    let row = local / 32u * 4u;
    let lane = local % 32u;
    workgroupBarrier();
    fill_odds(local, at, stride, count, first, beta);
    workgroupBarrier();
    return vec4<f32>(
        alpha_of(first, lane, row, centre),
        alpha_of(first, lane, row + 1u, centre),
        alpha_of(first, lane, row + 2u, centre),
        alpha_of(first, lane, row + 3u, centre));
}

#ifndef READ
fn store_alphas(local: u32, alpha: vec4<f32>) {
    let at = local % 32u * 33u + local / 32u * 4u;
    alphas[at] = alpha.x;
    alphas[at + 1u] = alpha.y;
    alphas[at + 2u] = alpha.z;
    alphas[at + 3u] = alpha.w;
}

// Σ over the tile's buckets of Ψ·α, of four queries with this invocation's key.
fn meet(local: u32) -> vec4<f32> {
    var sum = vec4<f32>();
    for (var s = 0u; s < 32u; s++) {
        sum += weights[s * 9u + local / 32u] * alphas[s * 33u + local % 32u];
    }
    return sum;
}
#endif

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let block = index % CHANNEL_BLOCKS;
    let tile = index / CHANNEL_BLOCKS % 2u;
    let in_group = index / (CHANNEL_BLOCKS * 2u) % GROUP;
    let chunk = index / (CHANNEL_BLOCKS * 2u * GROUP) % p.chunks;
    let unit = index / (CHANNEL_BLOCKS * 2u * GROUP * p.chunks);
    let b = unit / p.heads;
    let h = unit % p.heads;
    let kv_head = p.head + h;
    let length = length_of(b);
    let first_query = chunk * CHUNK + tile * 32u;
    if first_query >= length {
        return;
    }
    let queries = min(32u, length - first_query);
    let beta = beta_of(kv_head);
    let centre = centre_of(kv_head);
    // Invocation (i, lane): queries 4i to 4i + 3, with a bucket, a key or its channels.
    let lane = local % 32u;
    let row8 = local / 32u;
    let matrix = sums_before(unit, chunk);
#ifndef READ
    let k_at = p.k_at + ((b * p.tokens + chunk * CHUNK) * p.heads + h) * BITS;
    let k_stride = p.heads * BITS;
#endif
    let q_stride = p.heads * GROUP * BITS;
    let q_at = p.q_at + (((b * p.tokens + first_query) * p.heads + h) * GROUP + in_group) * BITS;

#repeat i PAIRS
    let channel$i = block * CHANNELS + $iu * 64u + lane;
    let near$i = min(channel$i, VALUE_DIM - 1u);
    let far$i = min(channel$i + 32u, VALUE_DIM - 1u);
    var low$i = vec4<f32>();
    var high$i = vec4<f32>();
    var near_mean$i = 0.0;
    var far_mean$i = 0.0;
#end
    let seen = matrix_mass(matrix, BUCKETS);
    if seen > 0.0 {
#repeat i PAIRS
        near_mean$i = centre * matrix_element(matrix, BUCKETS, near$i) / seen;
        far_mean$i = centre * matrix_element(matrix, BUCKETS, far$i) / seen;
#end
    }
#ifndef READ
    let v_at = input_at(b, chunk * CHUNK, kv_head);
    if seen <= 0.0 {
#repeat i PAIRS
        near_mean$i = centre * input_element(v_at + near$i);
        far_mean$i = centre * input_element(v_at + far$i);
#end
    }
#endif
    // Weights for this invocation's key, in both halves of the chunk up to the queries' own.
    var own = vec4<f32>();
#ifndef READ
    var before = vec4<f32>();
#endif
    // This invocation's parts of Σ Ψ_s·(mass column), and of the last row's weight.
    var mass_part = vec4<f32>();
#ifndef RATIO
    var last_part = vec4<f32>();
#ifdef READ
    let n = vec4<f32>(seen);
#else
    let n = seen + vec4<f32>(vec4<u32>(1u, 2u, 3u, 4u) + tile * 32u + row8 * 4u);
#endif
#endif

    for (var first = 0u; first < BUCKETS; first += 32u) {
        var entry = 0.0;
        if first + lane < BUCKETS {
            entry = matrix_mass(matrix, first + lane);
        }
#ifndef RATIO
        var mass = vec4<f32>(entry);
#endif
#ifndef READ
        // The keys of the first half; where the queries are of the second, all of them are seen.
        var alpha = alpha_tile(local, k_at, k_stride, select(32u, queries, tile == 0u), first, beta, centre);
        store_alphas(local, alpha);
        if tile == 1u {
#ifndef RATIO
            totals[local] = alpha.x + alpha.y + alpha.z + alpha.w;
            workgroupBarrier();
            for (var r = 0u; r < 8u; r++) {
                mass += totals[r * 32u + lane];
            }
#endif
            alpha = alpha_tile(local, k_at + 32u * k_stride, k_stride, queries, first, beta, centre);
        }
#ifndef RATIO
        // Sums over the keys up to each query.
        let two = alpha.x + alpha.y;
        let three = two + alpha.z;
        workgroupBarrier();
        totals[local] = three + alpha.w;
        workgroupBarrier();
        for (var r = 0u; r < row8; r++) {
            mass += totals[r * 32u + lane];
        }
        mass += vec4<f32>(alpha.x, two, three, three + alpha.w);
#endif
#endif
        let query = alpha_tile(local, q_at, q_stride, queries, first, beta, centre);
#ifdef RATIO
        let weight = query;
#else
        var weight = vec4<f32>();
        if first + lane < BUCKETS {
            let excess = mass + SIZE * 1e-6;
            let full = centre * n + excess;
            weight = (query - centre * select(vec4<f32>(), excess / n, n > vec4<f32>())) / full;
            last_part += (query + centre) / full;
        }
#endif
        mass_part += weight * entry;
        weights[lane * 9u + row8] = weight;
        workgroupBarrier();
#ifndef READ
        if tile == 1u {
            before += meet(local);
            workgroupBarrier();
            store_alphas(local, alpha);
            workgroupBarrier();
        }
        own += meet(local);
#endif
        let rows = min(32u, BUCKETS - first);
        for (var s = 0u; s < rows; s++) {
            let weight = weights[s * 9u + row8];
#repeat i PAIRS
            low$i += weight * matrix_element(matrix, first + s, near$i);
            high$i += weight * matrix_element(matrix, first + s, far$i);
#end
        }
    }

#ifdef RATIO
    let last = vec4<f32>(centre * f32(BUCKETS));
#else
    let inverse_masses = lane_sum(local, last_part);
    let last = centre * inverse_masses;
#endif
    var divisor = lane_sum(local, mass_part);
#repeat i PAIRS
    low$i += last * (matrix_element(matrix, BUCKETS, near$i) - seen * near_mean$i) - divisor * near_mean$i;
    high$i += last * (matrix_element(matrix, BUCKETS, far$i) - seen * far_mean$i) - divisor * far_mean$i;
#end
#ifndef READ
    // Queries see the keys up to their own.
    let own_query = vec4<u32>(0u, 1u, 2u, 3u) + row8 * 4u;
    own = select(vec4<f32>(), own + last, own_query >= vec4<u32>(lane));
    if tile == 1u {
        before += last;
    }
    for (var half = 0u; half <= tile; half++) {
        let keys = select(32u, queries, half == tile);
        workgroupBarrier();
        weights[lane * 9u + row8] = select(before, own, half == tile);
        workgroupBarrier();
        for (var j = 0u; j < keys; j++) {
            let weight = weights[j * 9u + row8];
            let at = v_at + (half * 32u + j) * p.in_token;
#repeat i PAIRS
            low$i += weight * (input_element(at + near$i) - near_mean$i);
            high$i += weight * (input_element(at + far$i) - far_mean$i);
#end
        }
    }
#endif
    // What the weights add up to: all of them, as o has them.
#ifdef RATIO
    divisor += last * seen;
#ifndef READ
    divisor += lane_sum(local, own + before);
#endif
    let factor = select(vec4<f32>(), 1.0 / divisor, divisor > vec4<f32>());
    let whole = select(vec4<f32>(), vec4<f32>(1.0), divisor > vec4<f32>());
#else
    let factor = vec4<f32>(p.scale);
    let whole = p.scale * (f32(BUCKETS) - SIZE * 1e-6 * inverse_masses);
#endif
#repeat i PAIRS
    low$i = low$i * factor + whole * near_mean$i;
    high$i = high$i * factor + whole * far_mean$i;
#end
#ifdef SUMMED
    let first_row = row8 * 4u;
    // Every invocation meets its own sums again.
#repeat r 4
    if first_row + $ru < queries {
        let sum$r = (((b * p.tokens + first_query + first_row + $ru) * p.heads + h) * GROUP + in_group) * VALUE_DIM;
#repeat i PAIRS
        if channel$i < VALUE_DIM {
            if (p.flags & 1u) != 0u {
                low$i[$r] += sums[sum$r + channel$i];
            }
            sums[sum$r + channel$i] = low$i[$r];
        }
        if channel$i + 32u < VALUE_DIM {
            if (p.flags & 1u) != 0u {
                high$i[$r] += sums[sum$r + channel$i + 32u];
            }
            sums[sum$r + channel$i + 32u] = high$i[$r];
        }
#end
    }
#end
    if (p.flags & 2u) == 0u {
        return;
    }
#repeat i PAIRS
    low$i = low$i / f32(ENSEMBLES);
    high$i = high$i / f32(ENSEMBLES);
#end
#endif
    // Each stores two neighbouring channels of two queries.
    let first_channel = block * CHANNELS + lane % 16u * 2u;
#repeat i PAIRS
    store_run(local, low$i, first_channel + $iu * 64u, b, first_query, queries, kv_head * GROUP + in_group);
    store_run(local, high$i, first_channel + $iu * 64u + 32u, b, first_query, queries, kv_head * GROUP + in_group);
#end
}

// Stores what all invocations have of 32 channels.
fn store_run(local: u32, value: vec4<f32>, channel: u32, b: u32, first_query: u32, queries: u32, head: u32) {
    workgroupBarrier();
    weights[local] = value;
    workgroupBarrier();
    let row8 = local / 32u;
    let pair = local % 16u * 2u;
    let x = weights[row8 * 32u + pair];
    let y = weights[row8 * 32u + pair + 1u];
    let second = local % 32u / 16u;
    if channel < VALUE_DIM {
#repeat r 2
        let query$r = row8 * 4u + second * 2u + $ru;
        if query$r < queries {
            let at = p.out_at + b * p.out_batch + ((first_query + query$r) * Q_HEADS + head) * VALUE_DIM + channel;
            store(at, select(x[$r], x[$r + 2], second == 1u), select(y[$r], y[$r + 2], second == 1u), channel + 1u < VALUE_DIM);
        }
#end
    }
}
