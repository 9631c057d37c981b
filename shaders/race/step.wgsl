#import params
#import input
#import tanh
#import hash
#import double
#ifndef MASS
#import store
#endif
// One token of each sequence: one workgroup per (sequence, kv head, 32 channels) takes in the key, B's columns of these
// channels, and reads the state for all query heads of the group. A second dispatch, with MASS, adds to A, which all of
// the first read as it was: one workgroup per (sequence, kv head, ensemble).
//
// The formulas are those of output.wgsl with an empty chunk.
@group(0) @binding(3) var<storage, read> planes: array<f32>;
@group(0) @binding(4) var<storage, read_write> state: array<vec2<f32>>;
#ifndef MASS
@group(0) @binding(5) var<storage, read> queries: array<u32>;
@group(0) @binding(6) var<storage, read> values: array<u32>;
@group(0) @binding(7) var<storage, read_write> out: array<u32>;
#endif

const COLUMNS: u32 = VALUE_DIM + 1u;
const CHANNEL_BLOCKS: u32 = (VALUE_DIM + 31u) / 32u;
#ifndef MASS
const HEAD_TILES: u32 = (GROUP + HEADS - 1u) / HEADS;
#endif
// Rows that are hashed together: the key, then queries.
var<workgroup> x: array<f32, HEAD_DIM * HASHES>;
// Parts of projections; then weights of 256 buckets.
var<workgroup> weights: array<f32, 256u * HASHES>;
#ifndef MASS
var<workgroup> partial: array<f32, 256>;
var<workgroup> pairs: array<vec2<f32>, 256>;
#endif
var<workgroup> odds: array<vec2<f32>, BITS * HASHES>;

// Hashes the rows of `x`, sixteen planes at a time and sixteen invocations each.
fn hash_rows(local: u32, planes_at: u32, beta: f32) {
    for (var base = 0u; base < BITS; base += 16u) {
        let plane = base + local / 16u;
#repeat h HASHES
        var sum$h = 0.0;
#end
        workgroupBarrier();
        if plane < BITS {
            for (var c = local % 16u; c < HEAD_DIM; c += 16u) {
                let w = planes[planes_at + plane * HEAD_DIM + c];
#repeat h HASHES
                sum$h += x[$hu * HEAD_DIM + c] * w;
#end
            }
        }
#repeat h HASHES
        weights[$hu * 256u + local] = sum$h;
#end
        workgroupBarrier();
        if local < 16u * HASHES && base + local % 16u < BITS {
            var total = 0.0;
            for (var i = 0u; i < 16u; i++) {
                total += weights[local * 16u + i];
            }
            odds[local / 16u * BITS + base + local % 16u] = logistic_pair(2.0 * beta * bounded_tanh(total));
        }
    }
    workgroupBarrier();
}

// R·φ of a bucket.
fn weight_of(slot: u32, bucket: u32) -> f32 {
    let table = slot * BITS + (bucket >> PLANES) * PLANES;
    var weight = 1.0;
    for (var plane = 0u; plane < PLANES; plane++) {
        let pair = odds[table + plane];
        weight *= 2.0 * select(pair.x, pair.y, ((bucket >> (PLANES - 1u - plane)) & 1u) == 1u);
    }
    return weight;
}

fn load_key(local: u32, b: u32, kv_head: u32) {
    let at = input_at(b, 0u, kv_head);
    workgroupBarrier();
    for (var c = local; c < HEAD_DIM; c += 256u) {
        x[c] = input_element(at + c);
    }
}

#ifndef MASS
// Sum of pairs over the invocations whose numbers are the same modulo `width`, in a fixed order.
fn pair_sum(local: u32, value: vec2<f32>, width: u32) -> vec2<f32> {
    workgroupBarrier();
    pairs[local] = value;
    workgroupBarrier();
    for (var step = 128u; step >= width; step = step >> 1u) {
        if local < step {
            pairs[local] = double_add(pairs[local], pairs[local + step]);
        }
        workgroupBarrier();
    }
    return pairs[local % width];
}

fn load_query(local: u32, slot: u32, b: u32, head: u32) {
    let at = p.in2_offset + b * p.in2_batch + head * p.in2_head;
    for (var c = local; c < HEAD_DIM; c += 256u) {
        x[slot * HEAD_DIM + c] = element_of(queries[input_word(at + c)], at + c);
    }
}

fn sum(local: u32, value: f32) -> f32 {
    workgroupBarrier();
    partial[local] = value;
    workgroupBarrier();
    for (var step = 128u; step > 0u; step = step >> 1u) {
        if local < step {
            partial[local] += partial[local + step];
        }
        workgroupBarrier();
    }
    return partial[0];
}
#endif

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
#ifdef MASS
    let ensemble = index % ENSEMBLES;
    let unit = index / ENSEMBLES;
#else
    let block = index % CHANNEL_BLOCKS;
    let unit = index / CHANNEL_BLOCKS;
#endif
    let b = unit / KV_HEADS;
    let kv_head = unit % KV_HEADS;
    if length_of(b) == 0u {
        return;
    }
    let beta = beta_of(kv_head);
#ifdef MASS
    load_key(local, b, kv_head);
    hash_rows(local, kv_head * p.planes_stride + ensemble * BITS * HEAD_DIM, beta);
    let masses_at = p.state_at + (unit * ENSEMBLES + ensemble) * BUCKETS * COLUMNS + VALUE_DIM;
    for (var s = local; s < BUCKETS; s += 256u) {
        let at = masses_at + s * COLUMNS;
        state[at] = double_add(state[at], vec2<f32>(weight_of(0u, s) / SIZE, 0.0));
    }
#else
    let centre = centre_of(kv_head);
    // Invocation (i, lane): every eighth bucket from i on, in one channel.
    let lane = local % 32u;
    let row8 = local / 32u;
    let channel = block * 32u + lane;
    let inside = channel < VALUE_DIM;
    let value_at = p.in3_offset + b * p.in3_batch + kv_head * p.in3_head + min(channel, VALUE_DIM - 1u);
    let value = element_of(values[input_word(value_at)], value_at) / SIZE;

    for (var tile = 0u; tile < HEAD_TILES; tile++) {
#repeat h HEADS
        // Of the first sixteen invocations, in two neighbouring channels.
        var result$h = vec2<f32>();
#end
        load_key(local, b, kv_head);
#repeat h HEADS
        load_query(local, 1u + $hu, b, kv_head * GROUP + min(tile * HEADS + $hu, GROUP - 1u));
#end
        for (var ensemble = 0u; ensemble < ENSEMBLES; ensemble++) {
            let planes_at = kv_head * p.planes_stride + ensemble * BITS * HEAD_DIM;
            let state_at = p.state_at + (unit * ENSEMBLES + ensemble) * BUCKETS * COLUMNS;
            hash_rows(local, planes_at, beta);
            // The key goes into B, with the first tile of heads; B's and A's column sums.
            var values_sum = vec2<f32>();
            var mass_sum = vec2<f32>();
            for (var first = 0u; first < BUCKETS; first += 256u) {
                workgroupBarrier();
                if first + local < BUCKETS {
                    weights[local] = weight_of(0u, first + local);
                    mass_sum = double_add(mass_sum, state[state_at + (first + local) * COLUMNS + VALUE_DIM]);
                }
                workgroupBarrier();
                let rows = min(256u, BUCKETS - first);
                for (var s = row8; s < rows && inside; s += 8u) {
                    let at = state_at + (first + s) * COLUMNS + channel;
                    var sum = state[at];
                    if tile == 0u {
                        sum = double_add(sum, vec2<f32>(weights[s] * value, 0.0));
                        state[at] = sum;
                    }
                    values_sum = double_add(values_sum, sum);
                }
            }
            let values_mean = double_over(pair_sum(local, values_sum, 32u), TABLES);
            let n = double_add(double_over(pair_sum(local, mass_sum, 1u), TABLES), vec2<f32>(1.0, 0.0));
            let mean = centre * values_mean.x / n.x;

#repeat h HEADS
            var read$h = 0.0;
            var mass$h = 0.0;
            var inverse$h = 0.0;
#end
            for (var first = 0u; first < BUCKETS; first += 256u) {
                workgroupBarrier();
                let bucket = first + local;
                if bucket < BUCKETS {
                    let key_weight = weight_of(0u, bucket);
                    let old = double_add(state[state_at + bucket * COLUMNS + VALUE_DIM] * SIZE, -centre * n);
                    let mass = double_add(old, vec2<f32>(key_weight, 0.0)).x;
                    let excess = mass + SIZE * 1e-6;
                    let full = centre * n.x + excess;
#repeat h HEADS
                    let alpha$h = weight_of(1u + $hu, bucket) - centre;
#ifdef RATIO
                    let weight$h = alpha$h;
#else
                    let weight$h = (alpha$h - centre * excess / n.x) / full;
                    inverse$h += (alpha$h + centre) / full;
#endif
                    mass$h += weight$h * mass;
                    weights[256u * (1u + $hu) + local] = weight$h;
#end
                }
                workgroupBarrier();
                let rows = min(256u, BUCKETS - first);
                for (var s = row8; s < rows && inside; s += 8u) {
                    let at = state_at + (first + s) * COLUMNS + channel;
                    let row = double_add(state[at] * SIZE, -centre * values_mean).x;
#repeat h HEADS
                    read$h += weights[256u * (1u + $hu) + s] * row;
#end
                }
            }
            // Means of all channels, where the first sixteen find them.
            workgroupBarrier();
            if row8 == 0u {
                pairs[lane].x = mean;
            }
#repeat h HEADS
            let mass_total$h = sum(local, mass$h);
#ifdef RATIO
            let divisor$h = mass_total$h + centre * f32(BUCKETS) * n.x;
            let factor$h = select(0.0, 1.0 / divisor$h, divisor$h > 0.0);
            let whole$h = select(0.0, 1.0, divisor$h > 0.0);
#else
            let factor$h = p.scale;
            let whole$h = p.scale * (f32(BUCKETS) - SIZE * 1e-6 * sum(local, inverse$h));
#endif
            workgroupBarrier();
            partial[local] = read$h;
            workgroupBarrier();
            if local < 16u {
                var pair = vec2<f32>();
                for (var r = 0u; r < 8u; r++) {
                    pair += vec2<f32>(partial[r * 32u + local * 2u], partial[r * 32u + local * 2u + 1u]);
                }
                let means = vec2<f32>(pairs[local * 2u].x, pairs[local * 2u + 1u].x);
                result$h += (pair - mass_total$h * means) * factor$h + whole$h * means;
            }
#end
        }
        let first_channel = block * 32u + local * 2u;
        if local < 16u && first_channel < VALUE_DIM {
#repeat h HEADS
            if tile * HEADS + $hu < GROUP {
                let at = p.out_at + b * p.out_batch + (kv_head * GROUP + tile * HEADS + $hu) * VALUE_DIM + first_channel;
                let o = result$h / f32(ENSEMBLES);
                store(at, o.x, o.y, first_channel + 1u < VALUE_DIM);
            }
#end
        }
    }
#endif
}
