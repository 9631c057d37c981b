#import params
#import quads
#import weights
#import matrices
#import panels
// [α, 1]ᵀ[v, 1] of the keys of a chunk: one workgroup per (unit, chunk, tile of 64 buckets, block of channels). With
// QUERIES it is what the queries of a chunk give to the gradient of the state that they read, over all heads of the
// group: `input` is grad_o, and readings stand for α and 1.
//
// The first block of channels also takes the column of masses, the first tile of buckets the row of sums.
@group(0) @binding(3) var<storage, read> t: array<f32>;
#ifdef QUADS
@group(0) @binding(4) var<storage, read_write> matrices: array<vec4<f32>>;
#else
@group(0) @binding(4) var<storage, read_write> matrices: array<f32>;
#endif
#ifdef QUERIES
@group(0) @binding(5) var<storage, read> readings: array<f32>;
#import readings
#endif

const TILES: u32 = (BUCKETS + 63u) / 64u;

fn store_quad(at: u32, channel: u32, x: vec4<f32>) {
#ifdef QUADS
    if channel < VALUE_DIM {
        matrices[(at + channel) >> 2u] = x;
    }
#else
    for (var i = p.zero; i < 4u; i++) {
        if channel + i < VALUE_DIM {
            matrices[at + channel + i] = x[i];
        }
    }
#endif
}

fn store_mass(at: u32, x: f32) {
#ifdef QUADS
    matrices[(at + VALUE_DIM) >> 2u].x = x;
#else
    matrices[at + VALUE_DIM] = x;
#endif
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let block = index % CHANNEL_BLOCKS;
    let tile = index / CHANNEL_BLOCKS % TILES;
    let chunk = index / (CHANNEL_BLOCKS * TILES) % p.chunks;
    let unit = index / (CHANNEL_BLOCKS * TILES) / p.chunks;
    let b = unit / p.heads;
    let head = unit % p.heads;
    let beta = beta_of(p.head + head);
    let centre = centre_of(p.head + head);
    let first = chunk * CHUNK;
    let length = length_of(b);
    if first >= length {
        return;
    }
    let count = min(CHUNK, length - first);

    // The filling invocation's token and its four buckets or channels, and the rows and columns of its sums.
    let step = row4_of(local);
    let four = column4_of(local);
    let bucket = tile * 64u + four * 4u;
    let channel = block * CHANNELS + four * 4u;
#repeat h PAIRS
    var sums$h = Block();
    var row$h = vec4<f32>();
#end
    var mass = vec4<f32>();
    var corner = 0.0;
#ifdef QUERIES
    for (var g = 0u; g < GROUP; g++) {
#else
    {
#endif
        for (var base = 0u; base < count; base += 16u) {
            let token = base + step;
            workgroupBarrier();
            var weights = vec4<f32>();
#repeat h PAIRS
            var x$h = vec4<f32>();
#end
            if token < count {
#ifdef QUERIES
                let q_row = ((b * p.tokens + first + token) * p.heads + head) * GROUP + g;
                let at = input_at(b, first + token, (p.head + head) * GROUP + g);
                let reading = reading_weight(q_row);
                let of_sums = reading_of_sums(q_row, centre);
                weights = reading_of_four(q_row, bucket, beta, centre);
#repeat h PAIRS
                x$h = reading.x * input_quad(at, channel + $hu * 64u, VALUE_DIM);
                row$h += of_sums * x$h;
#end
#ifdef RATIO
                mass += reading.y * weights;
                corner += reading.y * of_sums;
#else
                if block == 0u {
                    mass += mass_of_four(q_row, bucket);
                }
                corner += mass_of_sums(q_row);
#endif
#else
                let at = input_at(b, first + token, p.head + head);
                let row = (b * p.tokens + first + token) * p.heads + head;
                weights = alpha_of_four(p.k_at + row * BITS, bucket, beta, centre);
#repeat h PAIRS
                x$h = input_quad(at, channel + $hu * 64u, VALUE_DIM);
                row$h += x$h;
#end
                mass += weights;
                corner += 1.0;
#endif
            }
            panels[panel_at(0u, step, four)] = weights;
#repeat h PAIRS
            panels[panel_at(1u + $hu, step, four)] = x$h;
#end
            workgroupBarrier();
            for (var k = p.zero; k < 4u; k++) {
                let left_at = quad_at(0u, k, step);
                let right_at = quad_at(1u, k, four);
#repeat u 4
                let left$u = panels[left_at + $uu * FOUR_STEPS];
#repeat h PAIRS
                sums$h = add_product(sums$h, left$u, panels[right_at + $hu * PANEL + $uu * FOUR_STEPS]);
#end
#end
            }
        }
    }

    let out = (unit * p.slots + chunk) * MATRIX;
    let of_rows = out + (tile * 64u + step * 4u) * MATRIX_ROW;
#repeat h PAIRS
    if tile * 64u + step * 4u < BUCKETS {
        store_quad(of_rows, channel + $hu * 64u, sums$h.a);
    }
    if tile * 64u + step * 4u + 1u < BUCKETS {
        store_quad(of_rows + MATRIX_ROW, channel + $hu * 64u, sums$h.b);
    }
    if tile * 64u + step * 4u + 2u < BUCKETS {
        store_quad(of_rows + 2u * MATRIX_ROW, channel + $hu * 64u, sums$h.c);
    }
    if tile * 64u + step * 4u + 3u < BUCKETS {
        store_quad(of_rows + 3u * MATRIX_ROW, channel + $hu * 64u, sums$h.d);
    }
#end
    // Each invocation has summed its own tokens' part of the edges.
    workgroupBarrier();
    panels[panel_at(0u, step, four)] = mass;
#repeat h PAIRS
    panels[panel_at(1u + $hu, step, four)] = row$h;
#end
    panels[panel_at(3u, step, four)] = vec4<f32>(corner);
    workgroupBarrier();
    if step == 0u && block == 0u {
        let sum = panel_sum(0u, four);
        for (var i = p.zero; i < 4u; i++) {
            if bucket + i < BUCKETS {
                store_mass(out + (bucket + i) * MATRIX_ROW, sum[i]);
            }
        }
    }
    if step == 1u && tile == 0u {
#repeat h PAIRS
        store_quad(out + BUCKETS * MATRIX_ROW, channel + $hu * 64u, panel_sum(1u + $hu, four));
#end
    }
    if step == 2u && four == 0u && tile == 0u && block == 0u {
        store_mass(out + BUCKETS * MATRIX_ROW, panel_sum(3u, 0u).x);
    }
}
