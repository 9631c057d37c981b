#import params
#ifndef ABSORB
#import input2
#endif
#import weights
#import sums
// Gradient of 32 values of one kv head: one workgroup per (block of WIDTH channels, kv head, 32 tokens). Linear
// attention backwards in time: keys read the gradient of the state after the chunk, and the chunk's own later queries
// of all heads of the group. `input2` is grad_o. Ensembles after the first add (`flags` = 1).
@group(0) @binding(2) var<storage, read> t: array<f32>;
@group(0) @binding(3) var<storage, read> chunks: array<f32>;
@group(0) @binding(4) var<storage, read_write> dv: array<f32>;
#ifndef ABSORB
@group(0) @binding(6) var<storage, read> readings: array<f32>;
#import readings
var<workgroup> products: array<vec4<f32>, 256>;
#endif

const ROW: u32 = VALUE_DIM + 1u;
const BLOCKS: u32 = (VALUE_DIM + WIDTH - 1u) / WIDTH;

fn fill_keys(row: u32, rows: u32, row8: u32, bucket: u32, column: u32, beta: f32, centre: f32) {
    var x = vec4<f32>();
    for (var i = p.zero; i < 4u; i++) {
        if row8 * 4u + i < rows {
            x[i] = alpha_at(p.k_at + (row + (row8 * 4u + i) * p.heads) * BITS, bucket + column, beta, centre);
        }
    }
    left[left_at(column, row8)] = x;
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let start = index % BLOCKS * WIDTH;
    let head = index / BLOCKS % p.heads;
    let tiles = (p.tokens + 31u) / 32u;
    let token = index / (BLOCKS * p.heads) % tiles * 32u;
    let b = index / (BLOCKS * p.heads) / tiles;
    let length = length_of(b);
    let rows = min(32u, p.tokens - token);
    let row = (b * p.tokens + token) * p.heads + head;
    let beta = beta_of(p.head + head);
    let centre = centre_of(p.head + head);
    let chunk = token / CHUNK;
    let state = ((b * p.heads + head) * p.slots + min(chunk, p.slots - 1u)) * (BUCKETS + 1u) * ROW;

    let column = local % 32u;
    let row8 = local / 32u;
    clear_sums();
    // Of a tile of padding, nothing.
    let buckets = select(0u, BUCKETS, token < length);
    for (var slice = 0u; slice < buckets; slice += 32u) {
        workgroupBarrier();
        fill_keys(row, rows, row8, slice, column, beta, centre);
        for (var base = 0u; base < 32u; base += DEPTH) {
            workgroupBarrier();
            for (var i = local; i < 1024u; i += 256u) {
                let bucket = slice + base + i / WIDTH;
                let channel = start + i % WIDTH;
                var x = 0.0;
                if bucket < BUCKETS && channel < VALUE_DIM {
                    x = chunks[state + bucket * ROW + channel];
                }
                right[right_at(i / WIDTH, i % WIDTH)] = x;
            }
            workgroupBarrier();
            add_products(row8, column, base);
        }
    }
#repeat c COLUMNS
    if start + column + $cu * 32u < VALUE_DIM {
        sums[$c] += chunks[state + BUCKETS * ROW + start + column + $cu * 32u];
    }
#end
#ifndef ABSORB
    let position = vec4<u32>(token + row8 * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    let end = min(length, (chunk + 1u) * CHUNK);
    for (var g = 0u; g < GROUP; g++) {
        let q_head = (p.head + head) * GROUP + g;
        for (var first = token; first < end; first += 32u) {
            var product = vec4<f32>();
            for (var slice = 0u; slice < BUCKETS; slice += 32u) {
                workgroupBarrier();
                fill_keys(row, rows, row8, slice, column, beta, centre);
                let query = first + local / 8u;
                var x = vec4<f32>();
                if query < end {
                    x = reading_of_four(((b * p.tokens + query) * p.heads + head) * GROUP + g, slice + local % 8u * 4u, beta, centre);
                }
                for (var i = 0u; i < 4u; i++) {
                    right[square_at(local % 8u * 4u + i, local / 8u)] = x[i];
                }
                workgroupBarrier();
                product += square_product(row8, column);
            }
            if first + column < end {
                let q_row = ((b * p.tokens + first + column) * p.heads + head) * GROUP + g;
                product = (product + reading_of_sums(q_row, centre)) * reading_weight(q_row).x;
                product = select(vec4<f32>(), product, position <= vec4<u32>(first + column));
            }
            products[left_at(column, row8)] = select(vec4<f32>(), product, first + column < end);
            for (var base = 0u; base < 32u; base += DEPTH) {
                workgroupBarrier();
                for (var i = local; i < 1024u; i += 256u) {
                    let query = first + base + i / WIDTH;
                    let channel = start + i % WIDTH;
                    var x = 0.0;
                    if query < end && channel < VALUE_DIM {
                        x = input2_element(input2_at(b, query, q_head) + channel);
                    }
                    right[right_at(i / WIDTH, i % WIDTH)] = x;
                }
                workgroupBarrier();
                for (var k = p.zero; k < DEPTH; k += 4u) {
#repeat u 4
                    let a$u = products[left_at(base + k + $uu, row8)];
#repeat c COLUMNS
                    sums[$c] += a$u * right[right_at(k + $uu, column + $cu * 32u)];
#end
#end
                }
            }
        }
    }
#endif
    for (var i = 0u; i < 4u; i++) {
        let r = row8 * 4u + i;
        if r < rows {
            let at = p.out_at + b * p.out_batch + ((token + r) * KV_HEADS + p.head + head) * VALUE_DIM + start + column;
            let real = token + r < length;
#repeat c COLUMNS
            if start + column + $cu * 32u < VALUE_DIM {
                let x = select(0.0, sums[$c][i], real);
                if (p.flags & 1u) == 1u {
                    dv[at + $cu * 32u] += x;
                } else {
                    dv[at + $cu * 32u] = x;
                }
            }
#end
        }
    }
}
