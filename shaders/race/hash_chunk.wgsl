#import params
#import quads
#import quads 2
#import weights
#import matrix_quads
#import panels
#import meets
#import tanh
// Gradients of the hashes of the 64 queries of a chunk and one head, or with KEYS of its keys, where all buckets fit a
// panel: one workgroup per (unit, chunk, head). Products of a row with those of the chunk that it meets are made once;
// then what the rows take from the matrix and from each other is summed per bucket.
//
// Queries (ratio): `input` is grad_o, `input2` v. With G scaled, and sums over the keys j up to a query,
// value_s = G·M_s + Σ (G·v_j)·α_js, mass_s the same of the column of masses and of ones, dα = value / D + dD·mass. Also
// writes what later kernels need of a query, (scale / D, dD), where o = N / D.
//
// Keys: `input` is v, `input2` grad_o, the matrix is the gradient of the sums after the chunk:
// dα_s = [v, 1]·M_s + Σ (G_j·v·scale / D_j + dD_j)·Ψ_js over the chunk's queries from the key on, of all heads of the
// group; for bucket forms what readings say stands for these weights, and the gradients of masses come on top.
@group(0) @binding(3) var<storage, read> t: array<f32>;
@group(0) @binding(5) var<storage, read_write> s: array<f32>;
#ifdef KEYS
@group(0) @binding(7) var<storage, read> readings: array<f32>;
#import readings
const HEADS: u32 = 1u;
#else
@group(0) @binding(6) var<storage, read_write> readings: array<f32>;
const HEADS: u32 = GROUP;
#endif

const RADIX: u32 = 1u << PLANES;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let in_group = index % HEADS;
    let chunk = index / HEADS % p.chunks;
    let unit = index / HEADS / p.chunks;
    let b = unit / p.heads;
    let head = unit % p.heads;
    let kv_head = p.head + head;
    let beta = beta_of(kv_head);
    let centre = centre_of(kv_head);
    let first = chunk * CHUNK;
    let rows = min(CHUNK, p.tokens - first);
    let count = min(rows, max(length_of(b), first) - first);
    let key_row = (b * p.tokens + first) * p.heads + head;
    // Where this kernel's rows stand, in the buffers of the piece.
#ifdef KEYS
    let place = key_row;
    let place_step = p.heads;
    let t_at = p.k_at;
#else
    let place = key_row * GROUP + in_group;
    let place_step = p.heads * GROUP;
    let t_at = p.q_at;
#endif
#ifdef KEYS
    let matrix = sums_after(unit, chunk, length_of(b));
#else
    let matrix = sums_before(unit, chunk);
#endif

    // The rows and columns of this invocation's sums; where it fills, a row and four of its channels.
    let row4 = row4_of(local);
    let column4 = column4_of(local);
    let own_row = local / 4u;
    let quad = local % 4u;
    let columns = vec4<u32>(column4 * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    let rows4 = vec4<u32>(row4 * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
    var values = Block();
    // What all of this invocation's rows meet of masses.
    var met_by_all = vec4<f32>();
#ifndef KEYS
    var masses = Block();
    var gain = vec4<f32>();
    let seen = matrix_mass(matrix, BUCKETS);
#endif
    // Of a chunk of padding, nothing.
#ifdef KEYS
    for (var g = select(0u, GROUP, count == 0u); g < GROUP; g++) {
        let reads_matrix = g == 0u;
#else
    for (var g = select(in_group, GROUP, count == 0u); g < min(in_group + 1u, GROUP); g++) {
        let reads_matrix = true;
#endif
        var meet = Block();
        // What the next panels are made of is loaded while products of these are summed. Rows past the last stand for
        // none: nothing of them is kept.
        let token = first + min(own_row, count - 1u);
        let q_head = kv_head * GROUP + g;
#ifdef KEYS
        let own_at = input_at(b, token, kv_head);
        let other_at = input2_at(b, token, q_head);
        let scale = 1.0;
#else
        let own_at = input_at(b, token, q_head);
        let other_at = input2_at(b, token, kv_head);
        let scale = p.scale;
#endif
        let m_row = min(own_row, BUCKETS - 1u);
        var own_quad = input_quad(own_at, quad * 4u, VALUE_DIM);
        var other_quad = input2_quad(other_at, quad * 4u, VALUE_DIM);
        var m = vec4<f32>();
        if reads_matrix {
            m = matrix_quad(matrix, m_row, quad * 4u);
        }
        for (var start = 0u; start < VALUE_DIM; start += 16u) {
            workgroupBarrier();
            set_row(0u, own_row, quad, scale * own_quad);
            set_row(2u, own_row, quad, other_quad);
            if reads_matrix {
                set_row(1u, own_row, quad, m);
            }
            workgroupBarrier();
#ifndef KEYS
            let entry = matrix_element(matrix, BUCKETS, min(start + column4, VALUE_DIM - 1u));
#endif
            let next = start + 16u + quad * 4u;
            if start + 16u < VALUE_DIM {
                own_quad = input_quad(own_at, next, VALUE_DIM);
                other_quad = input2_quad(other_at, next, VALUE_DIM);
                if reads_matrix {
                    m = matrix_quad(matrix, m_row, next);
                }
            }
            for (var k = 0u; k < 4u; k++) {
                let left_at = quad_at(0u, k, row4);
                let right_at = quad_at(1u, k, column4);
#repeat u 4
                let left$u = panels[left_at + $uu * FOUR_STEPS];
                meet = add_product(meet, left$u, panels[right_at + PANEL + $uu * FOUR_STEPS]);
                if reads_matrix {
                    values = add_product(values, left$u, panels[right_at + $uu * FOUR_STEPS]);
                }
#end
            }
#ifndef KEYS
            gain += panels[panel_at(0u, column4, row4)] * entry;
#endif
        }
#ifdef KEYS
        // How much of its four columns each of the four rows meets.
        var factor = vec4<f32>();
        var constant = vec4<f32>();
        for (var i = 0u; i < 4u; i++) {
            if columns[i] < count {
                let weight = reading_weight((key_row + columns[i] * p.heads) * GROUP + g);
                factor[i] = weight.x;
                constant[i] = weight.y;
            }
        }
        meet = Block(
            meet.a * factor + constant,
            meet.b * factor + constant,
            meet.c * factor + constant,
            meet.d * factor + constant);
#endif
        meet = met_by_rows(meet, row4, columns, count);
#ifndef KEYS
        let ones = vec4<f32>(1.0);
        gain += vec4<f32>(dot(meet.a, ones), dot(meet.b, ones), dot(meet.c, ones), dot(meet.d, ones));
#endif
        let first_other = key_row + min(row4, count - 1u) * p.heads;
#ifdef KEYS
        var hashes = reading_at(first_other * GROUP + g, column4 * 4u);
#else
        var hashes = hashes_at(p.k_at + first_other * BITS, column4 * 4u);
#endif
        for (var start = p.zero; start < count; start += 16u) {
            workgroupBarrier();
            if column4 / 4u == start / 16u {
                set_block(0u, column4 % 4u * 4u, row4, meet);
            }
            let sees = start + row4 < count;
#ifdef KEYS
            let other = reading_of(hashes, column4 * 4u, beta, centre);
#ifndef RATIO
            var other_mass = vec4<f32>();
            if sees {
                other_mass = mass_of_four((key_row + (start + row4) * p.heads) * GROUP + g, column4 * 4u);
            }
            panels[panel_at(2u, row4, column4)] = other_mass;
#endif
#else
            let other = alphas_of(hashes, column4 * 4u, beta, centre);
#endif
            panels[panel_at(1u, row4, column4)] = select(vec4<f32>(), other, sees);
            workgroupBarrier();
            if start + 16u < count {
                let next = key_row + min(start + 16u + row4, count - 1u) * p.heads;
#ifdef KEYS
                hashes = reading_at(next * GROUP + g, column4 * 4u);
#else
                hashes = hashes_at(p.k_at + next * BITS, column4 * 4u);
#endif
            }
            let met = quads_met(row4, start);
            for (var k = met.x; k < met.y; k++) {
                let left_at = quad_at(0u, k, row4);
                let right_at = quad_at(1u, k, column4);
#repeat u 4
                let right$u = panels[right_at + $uu * FOUR_STEPS];
                values = add_product(values, panels[left_at + $uu * FOUR_STEPS], right$u);
#end
                let is_own = start / 4u + k == row4;
#ifdef KEYS
#ifndef RATIO
                // The masses of buckets are denominators of their own.
#repeat u 4
                let mass$u = panels[right_at + PANEL + $uu * FOUR_STEPS];
#end
                if is_own {
                    let two = mass2 + mass3;
                    values.a += mass0 + mass1 + two;
                    values.b += mass1 + two;
                    values.c += two;
                    values.d += mass3;
                } else {
                    met_by_all += mass0 + mass1 + (mass2 + mass3);
                }
#endif
#else
                let two = right0 + right1;
                if is_own {
                    masses.a += right0;
                    masses.b += two;
                    masses.c += two + right2;
                    masses.d += two + (right2 + right3);
                } else {
                    met_by_all += two + (right2 + right3);
                }
#endif
            }
        }
    }

    // What the column of masses gives, then this invocation's own weights.
    var column = vec4<f32>();
    for (var i = 0u; i < 4u; i++) {
        if columns[i] < BUCKETS {
            column[i] = matrix_mass(matrix, columns[i]);
        }
    }
    column += met_by_all;
    var own = Block();
#ifdef KEYS
#repeat r 4
    let at$r = t_at + (place + rows4[$r] * place_step) * BITS;
#end
    if rows4.x < count {
        own.a = (alpha_of_four(at0, column4 * 4u, beta, centre) + centre) * (values.a + column);
    }
    if rows4.y < count {
        own.b = (alpha_of_four(at1, column4 * 4u, beta, centre) + centre) * (values.b + column);
    }
    if rows4.z < count {
        own.c = (alpha_of_four(at2, column4 * 4u, beta, centre) + centre) * (values.c + column);
    }
    if rows4.w < count {
        own.d = (alpha_of_four(at3, column4 * 4u, beta, centre) + centre) * (values.d + column);
    }
#else
    masses = Block(masses.a + column, masses.b + column, masses.c + column, masses.d + column);
#repeat r 4
    let at$r = t_at + (place + rows4[$r] * place_step) * BITS;
#end
    if rows4.x < count {
        own.a = alpha_of_four(at0, column4 * 4u, beta, centre);
    }
    if rows4.y < count {
        own.b = alpha_of_four(at1, column4 * 4u, beta, centre);
    }
    if rows4.z < count {
        own.c = alpha_of_four(at2, column4 * 4u, beta, centre);
    }
    if rows4.w < count {
        own.d = alpha_of_four(at3, column4 * 4u, beta, centre);
    }
    // D, and G·N: what o = N / D is made of.
    workgroupBarrier();
    panels[panel_at(0u, column4, row4)] = vec4<f32>(
        dot(own.a, masses.a),
        dot(own.b, masses.b),
        dot(own.c, masses.c),
        dot(own.d, masses.d));
    panels[panel_at(1u, column4, row4)] = vec4<f32>(
        dot(own.a, values.a),
        dot(own.b, values.b),
        dot(own.c, values.c),
        dot(own.d, values.d)) + centre * f32(BUCKETS) * gain;
    workgroupBarrier();
    let last = centre * f32(BUCKETS) * (seen + vec4<f32>(rows4 + 1u));
    let divisor = panel_sum(0u, row4) + last;
    let some = (divisor > vec4<f32>()) & (rows4 < vec4<u32>(count));
    let inverse = select(vec4<f32>(), 1.0 / divisor, some);
    let dmass = -panel_sum(1u, row4) * inverse * inverse;
    if column4 < 4u && row4 * 4u + column4 < rows {
        let at = (place + (row4 * 4u + column4) * place_step) * 2u;
        readings[at] = p.scale * inverse[column4];
        readings[at + 1u] = dmass[column4];
    }
    own.a = select(vec4<f32>(), (own.a + centre) * (values.a * inverse.x + masses.a * dmass.x), some.x);
    own.b = select(vec4<f32>(), (own.b + centre) * (values.b * inverse.y + masses.b * dmass.y), some.y);
    own.c = select(vec4<f32>(), (own.c + centre) * (values.c * inverse.z + masses.c * dmass.z), some.z);
    own.d = select(vec4<f32>(), (own.d + centre) * (values.d * inverse.w + masses.d * dmass.w), some.w);
#endif
    // Through the hash: with m = tanh(β·t), s_p = Σ_r dφ_r·φ_r·(c_rp − m_p), per table. A constant added to dφ over a
    // table changes nothing.
    workgroupBarrier();
    set_block(column4 / 4u, column4 % 4u * 4u, row4, own);
    workgroupBarrier();
    let row = local % 64u;
    if row >= rows {
        return;
    }
    let t_row = t_at + (place + row * place_step) * BITS;
    let s_row = (place + row * place_step) * S_STRIDE;
    for (var bit = local / 64u; bit < BITS; bit += 4u) {
        let shift = PLANES - 1u - bit % PLANES;
        let start = bit / PLANES * RADIX;
        var sum = 0.0;
        var signed = 0.0;
        for (var r = p.zero; r < RADIX; r++) {
            let bucket = start + r;
            let x = panels[panel_at(bucket >> 4u, bucket & 15u, row >> 2u)][row & 3u];
            sum += x;
            signed += select(-x, x, ((r >> shift) & 1u) == 1u);
        }
        s[s_row + bit] = signed - bounded_tanh(beta * t[t_row + bit]) * sum;
    }
}
