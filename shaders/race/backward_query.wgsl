#import params
#import input
#ifndef READ
#import input 2
#endif
#import weights
#import matrix_quads
#import tile
#import through_hash
// Gradient of the hash of 32 queries of one head: one workgroup per (query head, 32 tokens), all buckets. Also what
// later kernels need of a query:
//
//   ratio:   (scale / D, dD) per row, where o = N / D
//   buckets: per row, what multiplies the state's rows (buckets, then the row of sums), then the gradient of masses
//
// Products of grad_o with the values of the chunk are made once; a block of WIDTH buckets then takes two sums: of
// α times products, and of α alone.
@group(0) @binding(3) var<storage, read> t: array<f32>;
@group(0) @binding(5) var<storage, read_write> s: array<f32>;
@group(0) @binding(6) var<storage, read_write> readings: array<f32>;
#ifndef READ
// G·v of the chunk's keys and this tile's queries, 0 for keys that a query does not see.
var<workgroup> products: array<vec4<f32>, 512>;
#endif

const BLOCKS: u32 = (BUCKETS + WIDTH - 1u) / WIDTH;
const EPSILON: f32 = 1e-6 * SIZE;
#ifdef RATIO
const S_STRIDE: u32 = 2u * BITS;
const READING: u32 = 2u;
#else
const S_STRIDE: u32 = BITS;
const READING: u32 = 2u * (BUCKETS + 1u);
#endif
var<private> values: array<vec4<f32>, COLUMNS>;
var<private> masses: array<vec4<f32>, COLUMNS>;
// Sums over this invocation's buckets.
var<private> first_total: vec4<f32>;
var<private> second_total: vec4<f32>;

struct Tile {
    b: u32,
    head: u32,
    kv_head: u32,
    token: u32,
    length: u32,
    // Rows that the tensors have.
    rows: u32,
    row: u32,
    row_step: u32,
    beta: f32,
    centre: f32,
    // Tokens that each of this invocation's queries sees, and G·(sum of their values).
    seen: vec4<f32>,
    gain: vec4<f32>,
}

fn fill_gradient(tile: Tile, row8: u32, column: u32, slice: u32) {
    var x = vec4<f32>();
    let channel = slice + column;
    if channel < VALUE_DIM {
        for (var i = 0u; i < 4u; i++) {
            let token = tile.token + row8 * 4u + i;
            if token < tile.length {
                x[i] = p.scale * input_element(input_at(tile.b, token, p.head * GROUP + tile.head) + channel);
            }
        }
    }
    left[left_at(column, row8)] = x;
}

// One tile of 32 buckets, when its sums are complete.
fn finish(local: u32, tile: Tile, start: u32, value: vec4<f32>, mass: vec4<f32>) {
    if start >= BUCKETS {
        return;
    }
    let row8 = local / 32u;
    let bucket = start + local % 32u;
    var alpha = vec4<f32>();
    for (var i = p.zero; i < 4u; i++) {
        if row8 * 4u + i < tile.rows {
            alpha[i] = alpha_at(p.q_at + (tile.row + (row8 * 4u + i) * tile.row_step) * BITS, bucket, tile.beta, tile.centre);
        }
    }
    let t_at = p.q_at + tile.row * BITS;
    let t_step = tile.row_step * BITS;
    let s_at = tile.row * S_STRIDE;
    let s_step = tile.row_step * S_STRIDE;
    let phi = alpha + tile.centre;
#ifdef RATIO
    first_total += alpha * mass;
    second_total += alpha * value;
    for (var stream = p.zero; stream < 2u; stream++) {
        let part = phi * select(value, mass, stream == 1u);
        through_hash(local, stream, start, part, s_at + stream * BITS, s_step, t_at, t_step, tile.rows, tile.beta);
    }
#else
    // R·(A + ε); the share ω = φ / (A + ε); a constant over buckets is taken off both dα and what multiplies the
    // state's rows, which changes nothing in exact arithmetic and is most of them where the hash is flat.
    let floor = tile.seen + EPSILON;
    let inverse = 1.0 / (tile.centre * tile.seen + mass + EPSILON);
    let tilt = tile.centre * mass / floor;
    let dalpha = (value - tilt * tile.gain) * inverse;
    let share = phi * inverse;
    let excess = (alpha - tilt) * inverse;
    let dmass = -(dalpha * share + tile.centre * tile.gain / floor * excess);
    if bucket < BUCKETS {
        first_total += share;
        second_total += dmass;
        for (var i = 0u; i < 4u; i++) {
            let r = row8 * 4u + i;
            if r < tile.rows {
                let at = (tile.row + r * tile.row_step) * READING + bucket;
                let real = tile.token + r < tile.length;
                readings[at] = select(0.0, excess[i], real);
                readings[at + BUCKETS + 1u] = select(0.0, dmass[i], real);
            }
        }
    }
    through_hash(local, 0u, start, dalpha * phi, s_at, s_step, t_at, t_step, tile.rows, tile.beta);
#endif
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let heads = p.heads * GROUP;
    var tile: Tile;
    tile.head = index % heads;
    let tiles = (p.tokens + 31u) / 32u;
    let number = index / heads % tiles;
    tile.b = index / heads / tiles;
    tile.kv_head = tile.head / GROUP;
    tile.token = number * 32u;
    tile.length = length_of(tile.b);
    tile.rows = min(32u, p.tokens - tile.token);
    tile.row = (tile.b * p.tokens + tile.token) * heads + tile.head;
    tile.row_step = heads;
    if tile.token >= tile.length {
        for (var r = local / 32u; r < tile.rows; r += 8u) {
            let row = tile.row + r * tile.row_step;
            for (var i = local % 32u; i < BITS; i += 32u) {
                s[row * S_STRIDE + i] = 0.0;
            }
            for (var i = local % 32u; i < READING; i += 32u) {
                readings[row * READING + i] = 0.0;
            }
        }
        return;
    }
    tile.beta = beta_of(p.head + tile.kv_head);
    tile.centre = centre_of(p.head + tile.kv_head);
    let chunk = tile.token / CHUNK;
    let in_chunk = tile.token % CHUNK;
    let state = sums_before(tile.b * p.heads + tile.kv_head, chunk);

    let column = local % 32u;
    let row8 = local / 32u;
    let position = vec4<u32>(in_chunk + row8 * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    tile.seen = vec4<f32>(matrix_mass(state, BUCKETS));
    var gain = vec4<f32>();
#ifndef READ
    tile.seen += vec4<f32>(position + 1u);
    let keys = min(in_chunk + 32u, tile.length - chunk * CHUNK);
    for (var first = 0u; first < keys; first += 32u) {
        var product = vec4<f32>();
        for (var slice = 0u; slice < VALUE_DIM; slice += 32u) {
            workgroupBarrier();
            fill_gradient(tile, row8, column, slice);
            for (var i = row8; i < 32u; i += 8u) {
                var x = 0.0;
                if first + i < keys && slice + column < VALUE_DIM {
                    x = input2_element(input2_at(tile.b, chunk * CHUNK + first + i, p.head + tile.kv_head) + slice + column);
                }
                right[square_at(column, i)] = x;
            }
            workgroupBarrier();
            product += square_product(row8, column);
        }
        product = select(vec4<f32>(), product, position >= vec4<u32>(first + column));
        products[left_at(first + column, row8)] = product;
        gain += product;
    }
#endif
    for (var slice = 0u; slice < VALUE_DIM; slice += 32u) {
        workgroupBarrier();
        fill_gradient(tile, row8, column, slice);
        if slice + column < VALUE_DIM {
            gain += left[left_at(column, row8)] * matrix_element(state, BUCKETS, slice + column);
        }
    }
    tile.gain = sum_of_columns(row8, column, gain);
    first_total = vec4<f32>();
    second_total = vec4<f32>();

    for (var block = 0u; block < BLOCKS; block++) {
        let start = block * WIDTH;
#repeat c COLUMNS
        values[$c] = vec4<f32>();
        masses[$c] = vec4<f32>();
        if start + column + $cu * 32u < BUCKETS {
            masses[$c] += matrix_mass(state, start + column + $cu * 32u);
        }
#end
        for (var slice = 0u; slice < VALUE_DIM; slice += 32u) {
            workgroupBarrier();
            fill_gradient(tile, row8, column, slice);
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
                for (var k = p.zero; k < DEPTH; k += 4u) {
#repeat u 4
                    let a$u = left[left_at(base + k + $uu, row8)];
#repeat c COLUMNS
                    values[$c] += a$u * right[right_at(k + $uu, column + $cu * 32u)];
#end
#end
                }
            }
        }
#ifndef READ
        for (var first = 0u; first < keys; first += DEPTH) {
            workgroupBarrier();
            let key = first + local * 4u / WIDTH;
            let bucket = local * 4u % WIDTH;
            var alpha = vec4<f32>();
            if key < keys {
                let row = (tile.b * p.tokens + chunk * CHUNK + key) * p.heads + tile.kv_head;
                alpha = alpha_of_four(p.k_at + row * BITS, start + bucket, tile.beta, tile.centre);
            }
            for (var i = 0u; i < 4u; i++) {
                right[right_at(key - first, bucket + i)] = alpha[i];
            }
            workgroupBarrier();
            for (var k = p.zero; k < DEPTH; k += 4u) {
#repeat u 4
                let product$u = products[left_at(first + k + $uu, row8)];
                let sees$u = select(vec4<f32>(), vec4<f32>(1.0), position >= vec4<u32>(first + k + $uu));
#repeat c COLUMNS
                let alpha$cx$u = right[right_at(k + $uu, column + $cu * 32u)];
                values[$c] += product$u * alpha$cx$u;
                masses[$c] += sees$u * alpha$cx$u;
#end
#end
            }
        }
#endif
        for (var c = p.zero; c < COLUMNS; c++) {
            var value = values[0];
            var mass = masses[0];
#repeat i COLUMNS
            if c == $iu {
                value = values[$i];
                mass = masses[$i];
            }
#end
            finish(local, tile, start + c * 32u, value, mass);
        }
    }

    let first_sum = sum_of_columns(row8, column, first_total);
    let second_sum = sum_of_columns(row8, column, second_total);
    let real = vec4<u32>(tile.token + row8 * 4u) + vec4<u32>(0u, 1u, 2u, 3u) < vec4<u32>(tile.length);
#ifdef RATIO
    // D, and G·N: what o = N / D is made of.
    let mass = first_sum + tile.centre * f32(BUCKETS) * tile.seen;
    let value = second_sum + tile.centre * f32(BUCKETS) * tile.gain;
    let inverse = select(vec4<f32>(), 1.0 / mass, (mass > vec4<f32>()) & real);
    let dmass = -value * inverse * inverse;
    workgroupBarrier();
    if column < 4u {
        right[row8 * 4u + column] = inverse[column];
        right[32u + row8 * 4u + column] = dmass[column];
        if row8 * 4u + column < tile.rows {
            let at = (tile.row + (row8 * 4u + column) * tile.row_step) * READING;
            readings[at] = p.scale * inverse[column];
            readings[at + 1u] = dmass[column];
        }
    }
    workgroupBarrier();
    // dα = α-sums of products / D + dD · α-sums: both went through the hash by the hands of this invocation.
    let slot = local % 16u;
    if slot / PLANES < TILE_TABLES {
        for (var r = local / 16u; r < tile.rows; r += 16u) {
            let at = (tile.row + r * tile.row_step) * S_STRIDE + slot % PLANES;
            for (var table = slot / PLANES; table < TABLES; table += TILE_TABLES) {
                let i = at + table * PLANES;
                s[i] = right[r] * s[i] + right[32u + r] * s[i + BITS];
            }
        }
    }
#else
    if column < 4u && row8 * 4u + column < tile.rows {
        let at = (tile.row + (row8 * 4u + column) * tile.row_step) * READING + BUCKETS;
        let floor = tile.seen[column] + EPSILON;
        let constant = f32(BUCKETS) * tile.gain[column] / (floor * floor);
        readings[at] = select(0.0, tile.centre * first_sum[column], real[column]);
        readings[at + BUCKETS + 1u] = select(0.0, tile.centre * (second_sum[column] - constant), real[column]);
    }
#endif
}
