#import params
#import input
#ifndef ABSORB
#import input 2
#endif
#import weights
#import matrix_quads
#import sums
#import through_hash
// Gradient of the hash of 32 keys of one kv head: one workgroup per (block of WIDTH buckets, kv head, 32 tokens). The
// gradient of a key's weights is what the gradient of the state after the chunk gives, and what the chunk's own later
// queries give, of all heads of the group. `input` is v, `input2` grad_o.
@group(0) @binding(3) var<storage, read> t: array<f32>;
@group(0) @binding(5) var<storage, read_write> s: array<f32>;
#ifndef ABSORB
@group(0) @binding(7) var<storage, read> readings: array<f32>;
#import readings
var<workgroup> products: array<vec4<f32>, 256>;
#endif

const BLOCKS: u32 = (BUCKETS + WIDTH - 1u) / WIDTH;

fn fill_values(b: u32, head: u32, token: u32, length: u32, row8: u32, column: u32, slice: u32) {
    var x = vec4<f32>();
    let channel = slice + column;
    if channel < VALUE_DIM {
        for (var i = 0u; i < 4u; i++) {
            if token + row8 * 4u + i < length {
                x[i] = input_element(input_at(b, token + row8 * 4u + i, head) + channel);
            }
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
    if token >= length {
        if start == 0u {
            for (var i = local; i < rows * BITS; i += 256u) {
                s[(row + i / BITS * p.heads) * BITS + i % BITS] = 0.0;
            }
        }
        return;
    }
    let beta = beta_of(p.head + head);
    let centre = centre_of(p.head + head);
    let chunk = token / CHUNK;
    let state = sums_after(b * p.heads + head, chunk, length);

    let column = local % 32u;
    let row8 = local / 32u;
#repeat c COLUMNS
    sums[$c] = vec4<f32>();
    if start + column + $cu * 32u < BUCKETS {
        sums[$c] += matrix_mass(state, start + column + $cu * 32u);
    }
#end
    for (var slice = 0u; slice < VALUE_DIM; slice += 32u) {
        workgroupBarrier();
        fill_values(b, p.head + head, token, length, row8, column, slice);
        for (var base = 0u; base < 32u; base += DEPTH) {
            workgroupBarrier();
            for (var i = local; i < 1024u; i += 256u) {
                let bucket = start + i / DEPTH;
                let channel = slice + base + i % DEPTH;
                var x = 0.0;
                if bucket < BUCKETS && channel < VALUE_DIM {
                    x = matrix_element(state, bucket, channel);
                }
                right[right_at(i % DEPTH, i / DEPTH)] = x;
            }
            workgroupBarrier();
            add_products(row8, column, base);
        }
    }
#ifndef ABSORB
    let position = vec4<u32>(token + row8 * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    let end = min(length, (chunk + 1u) * CHUNK);
    for (var g = 0u; g < GROUP; g++) {
        let q_head = (p.head + head) * GROUP + g;
        for (var first = token; first < end; first += 32u) {
            let of_query = b * p.tokens + first + column;
            var product = vec4<f32>();
            for (var slice = 0u; slice < VALUE_DIM; slice += 32u) {
                workgroupBarrier();
                fill_values(b, p.head + head, token, length, row8, column, slice);
                for (var i = row8; i < 32u; i += 8u) {
                    var x = 0.0;
                    if first + i < end && slice + column < VALUE_DIM {
                        x = input2_element(input2_at(b, first + i, q_head) + slice + column);
                    }
                    right[square_at(column, i)] = x;
                }
                workgroupBarrier();
                product += square_product(row8, column);
            }
            if first + column < end {
                let weight = reading_weight((of_query * p.heads + head) * GROUP + g);
                product = select(vec4<f32>(), product * weight.x + weight.y, position <= vec4<u32>(first + column));
            }
            products[left_at(column, row8)] = select(vec4<f32>(), product, first + column < end);
            for (var base = 0u; base < 32u; base += DEPTH) {
                let step = local * 4u / WIDTH;
                let bucket = start + local * 4u % WIDTH;
                let query = first + base + step;
                let q_row = ((b * p.tokens + query) * p.heads + head) * GROUP + g;
                workgroupBarrier();
                var x = vec4<f32>();
                if query < end {
                    x = reading_of_four(q_row, bucket, beta, centre);
                }
                for (var i = 0u; i < 4u; i++) {
                    right[right_at(step, bucket - start + i)] = x[i];
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
#ifndef RATIO
                // The masses of buckets are denominators of their own.
                workgroupBarrier();
                x = vec4<f32>();
                if query < end {
                    x = mass_of_four(q_row, bucket);
                }
                for (var i = 0u; i < 4u; i++) {
                    right[right_at(step, bucket - start + i)] = x[i];
                }
                workgroupBarrier();
                for (var k = p.zero; k < DEPTH; k += 4u) {
#repeat u 4
                    let a$u = select(vec4<f32>(), vec4<f32>(1.0), position <= vec4<u32>(first + base + k + $uu));
#repeat c COLUMNS
                    sums[$c] += a$u * right[right_at(k + $uu, column + $cu * 32u)];
#end
#end
                }
#endif
            }
        }
    }
#endif
    for (var c = p.zero; c < COLUMNS && start + c * 32u < BUCKETS; c++) {
        var sum = sums[0];
#repeat i COLUMNS
        if c == $iu {
            sum = sums[$i];
        }
#end
        var phi = vec4<f32>();
        for (var i = p.zero; i < 4u; i++) {
            // Rows of padding give nothing.
            if token + row8 * 4u + i < length {
                phi[i] = alpha_at(p.k_at + (row + (row8 * 4u + i) * p.heads) * BITS, start + c * 32u + column, beta, centre) + centre;
            }
        }
        through_hash(local, 0u, start + c * 32u, sum * phi, row * BITS, p.heads * BITS, p.k_at + row * BITS, p.heads * BITS, rows, beta);
    }
}
