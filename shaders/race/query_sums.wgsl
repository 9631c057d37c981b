#import params
#import input
#import hash
#ifdef RATIO
#import weights
#endif
#import sums
// What the queries of a chunk give to the gradient of the state that they read: one workgroup per (block of WIDTH
// channels, 32 buckets, unit, chunk), over all heads of the group. `input` is grad_o. The first block also takes the
// column of masses, the first tile of buckets the row of sums.
@group(0) @binding(3) var<storage, read> readings: array<f32>;
@group(0) @binding(4) var<storage, read_write> chunks: array<f32>;
#ifdef RATIO
@group(0) @binding(5) var<storage, read> t: array<f32>;
#endif
#import readings

const ROW: u32 = VALUE_DIM + 1u;
const BLOCKS: u32 = (VALUE_DIM + WIDTH - 1u) / WIDTH;
const TILES: u32 = (BUCKETS + 31u) / 32u;
// Of the slice's queries: what multiplies the row of sums, and the factor of the column of masses.
var<workgroup> of_sums: array<f32, 32>;
var<workgroup> of_masses: array<f32, 32>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let start = index % BLOCKS * WIDTH;
    let tile = index / BLOCKS % TILES;
    let chunk = index / (BLOCKS * TILES) % p.chunks;
    let unit = index / (BLOCKS * TILES) / p.chunks;
    let b = unit / p.heads;
    let head = unit % p.heads;
    let beta = beta_of(p.head + head);
    let centre = centre_of(p.head + head);
    let end = min(length_of(b), (chunk + 1u) * CHUNK);

    let column = local % 32u;
    let row8 = local / 32u;
    // The filling invocation's query and four buckets.
    let step = local / 8u;
    let bucket = tile * 32u + local % 8u * 4u;
    clear_sums();
    var masses = vec4<f32>();
    var corner = 0.0;
#repeat c COLUMNS
    var sums_row$c = 0.0;
#end
    for (var g = 0u; g < GROUP; g++) {
        let q_head = (p.head + head) * GROUP + g;
        for (var first = chunk * CHUNK; first < end; first += 32u) {
            workgroupBarrier();
            var x = vec4<f32>();
            let q_row = ((b * p.tokens + first + step) * p.heads + head) * GROUP + g;
            if first + step < end {
                x = reading_of_four(q_row, bucket, beta, centre);
            }
            left[left_at(step, local % 8u)] = x;
#ifndef RATIO
            if first + step < end && start == 0u {
                masses += mass_of_four(q_row, bucket);
            }
#endif
            if local < 32u {
                var sums_weight = 0.0;
                var mass_weight = 0.0;
                if first + local < end {
                    let row = ((b * p.tokens + first + local) * p.heads + head) * GROUP + g;
                    sums_weight = reading_of_sums(row, centre);
#ifdef RATIO
                    mass_weight = reading_weight(row).y;
                    corner += sums_weight * mass_weight;
#else
                    corner += mass_of_sums(row);
#endif
                }
                of_sums[local] = sums_weight;
                of_masses[local] = mass_weight;
            }
            for (var base = 0u; base < 32u; base += DEPTH) {
                workgroupBarrier();
                for (var i = local; i < 1024u; i += 256u) {
                    let query = first + base + i / WIDTH;
                    let channel = start + i % WIDTH;
                    var x = 0.0;
                    if query < end && channel < VALUE_DIM {
                        let row = ((b * p.tokens + query) * p.heads + head) * GROUP + g;
                        x = reading_weight(row).x * input_element(input_at(b, query, q_head) + channel);
                    }
                    right[right_at(i / WIDTH, i % WIDTH)] = x;
                }
                workgroupBarrier();
                add_products(row8, column, base);
                if tile == 0u {
                    for (var k = p.zero; k < DEPTH; k++) {
#repeat c COLUMNS
                        sums_row$c += of_sums[base + k] * right[right_at(k, column + $cu * 32u)];
#end
                    }
                }
#ifdef RATIO
                if start == 0u {
                    for (var k = p.zero; k < DEPTH; k++) {
                        masses += left[left_at(base + k, row8)] * of_masses[base + k];
                    }
                }
#endif
            }
        }
    }

    let at = (unit * p.slots + chunk) * (BUCKETS + 1u) * ROW;
#repeat c COLUMNS
    if start + column + $cu * 32u < VALUE_DIM {
        for (var i = 0u; i < 4u; i++) {
            if tile * 32u + row8 * 4u + i < BUCKETS {
                chunks[at + (tile * 32u + row8 * 4u + i) * ROW + start + column + $cu * 32u] = sums[$c][i];
            }
        }
        if tile == 0u && row8 == 0u {
            chunks[at + BUCKETS * ROW + start + column + $cu * 32u] = sums_row$c;
        }
    }
#end
    if start != 0u {
        return;
    }
#ifndef RATIO
    // Each invocation has summed four buckets over every 32nd query.
    workgroupBarrier();
    left[left_at(step, local % 8u)] = masses;
    workgroupBarrier();
    masses = vec4<f32>();
    for (var k = p.zero; k < 32u; k++) {
        masses += left[left_at(k, row8)];
    }
#endif
    if column == 0u {
        for (var i = 0u; i < 4u; i++) {
            if tile * 32u + row8 * 4u + i < BUCKETS {
                chunks[at + (tile * 32u + row8 * 4u + i) * ROW + VALUE_DIM] = masses[i];
            }
        }
    }
    if tile != 0u {
        return;
    }
    workgroupBarrier();
    if local < 32u {
        of_sums[local] = corner;
    }
    workgroupBarrier();
    if local == 0u {
        var sum = 0.0;
        for (var k = p.zero; k < 32u; k++) {
            sum += of_sums[k];
        }
        chunks[at + BUCKETS * ROW + VALUE_DIM] = sum;
    }
}
