#import params
#import quads
#import weights
#import matrix_quads
#import panels
#import meets
#import store_quads
// What the 64 rows of a chunk read: one workgroup per (unit, chunk, head, block of channels).
//
// Queries of one head read the sums before the chunk and the chunk's own keys up to each, o = N / D with
// N = Ψ·M + tril(Ψ·αᵀ)·v, for Ψ = [α, c·S] and a matrix whose last row is that of sums; D is the same of the column of
// masses and of ones. With KEYS the keys read the gradient of the sums after the chunk and the chunk's own queries from
// each on, of all heads of the group, dv = α·M + triu(α·Ψᵀ)·(G·scale / D): `input` is grad_o then. With ALONE there are
// no rows of the chunk to read, and one matrix a unit.
//
// Where c = 1 the values that queries read are taken from a constant row μ close to their mean, which all weights
// together bring back: what a query's weights make of the rest is not rounded with what is the same for all queries.
@group(0) @binding(3) var<storage, read> t: array<f32>;
#ifdef KEYS
#ifndef ALONE
@group(0) @binding(6) var<storage, read> readings: array<f32>;
#import readings
#endif
const HEADS: u32 = 1u;
#ifdef ALONE
const READ: u32 = 1u;
#else
const READ: u32 = GROUP;
#endif
#else
const HEADS: u32 = GROUP;
#endif

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let block = index % CHANNEL_BLOCKS;
    let in_group = index / CHANNEL_BLOCKS % HEADS;
    let chunk = index / (CHANNEL_BLOCKS * HEADS) % p.chunks;
    let unit = index / (CHANNEL_BLOCKS * HEADS) / p.chunks;
    let b = unit / p.heads;
    let head = unit % p.heads;
    let kv_head = p.head + head;
    let beta = beta_of(kv_head);
    let centre = centre_of(kv_head);
    let first = chunk * CHUNK;
    let rows = min(CHUNK, p.tokens - first);
    let count = min(rows, max(length_of(b), first) - first);
    let token_row = (b * p.tokens + first) * p.heads + head;
#ifdef KEYS
    let matrix = sums_after(unit, chunk, length_of(b));
#else
    let matrix = sums_before(unit, chunk);
#endif

    // The rows and columns of this invocation's sums; where it fills along steps, the step and its four.
    let row4 = row4_of(local);
    let column4 = column4_of(local);
    let channel = block * CHANNELS + column4 * 4u;
    // Where it fills along rows, the row and a quarter of the steps.
    let own_row = local / 4u;
    let quad = local % 4u;
#repeat h PAIRS
    var sums$h = Block();
#end

#ifdef KEYS
    let last = 1.0;
#else
    if count == 0u {
        return;
    }
    let last = centre * f32(BUCKETS);
    let seen = matrix_mass(matrix, BUCKETS);
    var mass = vec4<f32>();
    var own_mass = vec4<f32>();
#repeat h PAIRS
    var mean$h = vec4<f32>();
    if seen > 0.0 {
        mean$h = centre / seen * matrix_quad(matrix, BUCKETS, channel + $hu * 64u);
    }
#ifndef ALONE
    if seen <= 0.0 {
        mean$h = centre * input_quad(input_at(b, first, kv_head), channel + $hu * 64u, VALUE_DIM);
    }
#endif
#end
#endif

#ifdef KEYS
    // Of a chunk of padding, nothing.
    for (var g = select(0u, READ, count == 0u); g < READ; g++) {
#else
    for (var g = in_group; g <= in_group; g++) {
#endif
#ifdef KEYS
        let reads_matrix = g == 0u;
#else
        let reads_matrix = true;
#endif
        var meet = Block();
        // What the next panels are made of is loaded while products of these are summed. Rows and buckets past the last
        // stand for none: their weights are zero, or nobody reads their sums.
        let real_row = min(own_row, count - 1u);
        let k_at = p.k_at + (token_row + real_row * p.heads) * BITS;
        let q_row = (token_row + real_row * p.heads) * GROUP + g;
#ifdef KEYS
        let own_at = k_at;
#else
        let own_at = p.q_at + q_row * BITS;
#endif
        var own = hashes_at(own_at, quad * 4u);
#ifndef ALONE
#ifdef KEYS
        var other = reading_at(q_row, quad * 4u);
#else
        var other = hashes_at(k_at, quad * 4u);
#endif
#endif
#repeat h PAIRS
        var m$h = vec4<f32>();
        if reads_matrix {
            m$h = matrix_quad(matrix, min(row4, BUCKETS - 1u), channel + $hu * 64u);
        }
#end
        for (var start = 0u; start < BUCKETS; start += 16u) {
            workgroupBarrier();
            let four = start + quad * 4u;
            set_row(0u, own_row, quad, select(vec4<f32>(), alphas_of(own, four, beta, centre), own_row < count));
#ifndef ALONE
#ifdef KEYS
            let weights = reading_of(other, four, beta, centre);
#else
            let weights = alphas_of(other, four, beta, centre);
#endif
            set_row(3u, own_row, quad, select(vec4<f32>(), weights, own_row < count));
#endif
            if reads_matrix {
#repeat h PAIRS
                panels[panel_at(1u + $hu, row4, column4)] = m$h;
#end
            }
            workgroupBarrier();
#ifndef KEYS
            let entry = matrix_mass(matrix, min(start + column4, BUCKETS - 1u));
#endif
            let next = start + 16u;
            if next < BUCKETS {
                own = hashes_at(own_at, next + quad * 4u);
#ifndef ALONE
#ifdef KEYS
                other = reading_at(q_row, next + quad * 4u);
#else
                other = hashes_at(k_at, next + quad * 4u);
#endif
#endif
                if reads_matrix {
#repeat h PAIRS
                    m$h = matrix_quad(matrix, min(next + row4, BUCKETS - 1u), channel + $hu * 64u);
#end
                }
            }
            if reads_matrix {
                for (var k = 0u; k < 4u; k++) {
                    let left_at = quad_at(0u, k, row4);
                    let right_at = quad_at(1u, k, column4);
#repeat u 4
                    let left$u = panels[left_at + $uu * FOUR_STEPS];
#repeat h PAIRS
                    sums$h = add_product(sums$h, left$u, panels[right_at + $hu * PANEL + $uu * FOUR_STEPS]);
#end
#end
                }
            }
#ifndef KEYS
            mass += panels[panel_at(0u, column4, row4)] * entry;
#endif
#ifndef ALONE
            for (var k = 0u; k < 4u; k++) {
                let left_at = quad_at(0u, k, row4);
                let right_at = quad_at(3u, k, column4);
#repeat u 4
                meet = add_product(meet, panels[left_at + $uu * FOUR_STEPS], panels[right_at + $uu * FOUR_STEPS]);
#end
            }
#endif
        }
#ifndef ALONE
#ifdef KEYS
        let v_head = kv_head * GROUP + g;
#else
        let v_head = kv_head;
#endif
        let of_first = input_at(b, first + min(row4, count - 1u), v_head);
#repeat h PAIRS
        var x$h = input_quad(of_first, channel + $hu * 64u, VALUE_DIM);
#end
        let columns = vec4<u32>(column4 * 4u) + vec4<u32>(0u, 1u, 2u, 3u);
#ifdef KEYS
        // How much of its four columns each of the four rows meets.
        var factor = vec4<f32>();
        var met_last = vec4<f32>();
        for (var i = 0u; i < 4u; i++) {
            if columns[i] < count {
                let q_row = (token_row + columns[i] * p.heads) * GROUP + g;
                factor[i] = reading_weight(q_row).x;
                met_last[i] = reading_of_sums(q_row, centre);
            }
        }
        meet = Block(
            (meet.a + met_last) * factor,
            (meet.b + met_last) * factor,
            (meet.c + met_last) * factor,
            (meet.d + met_last) * factor);
#else
        meet = Block(meet.a + last, meet.b + last, meet.c + last, meet.d + last);
#endif
        meet = met_by_rows(meet, row4, columns, count);
#ifndef KEYS
        let ones = vec4<f32>(1.0);
        own_mass += vec4<f32>(dot(meet.a, ones), dot(meet.b, ones), dot(meet.c, ones), dot(meet.d, ones));
#endif
        for (var start = 0u; start < count; start += 16u) {
            workgroupBarrier();
            if column4 / 4u == start / 16u {
                set_block(0u, column4 % 4u * 4u, row4, meet);
            }
#repeat h PAIRS
#ifdef KEYS
            panels[panel_at(1u + $hu, row4, column4)] = x$h;
#else
            panels[panel_at(1u + $hu, row4, column4)] = x$h - mean$h;
#endif
#end
            workgroupBarrier();
            if start + 16u < count {
                let at = input_at(b, first + min(start + 16u + row4, count - 1u), v_head);
#repeat h PAIRS
                x$h = input_quad(at, channel + $hu * 64u, VALUE_DIM);
#end
            }
            let met = quads_met(row4, start);
            for (var k = met.x; k < met.y; k++) {
                let left_at = quad_at(0u, k, row4);
                let right_at = quad_at(1u, k, column4);
#repeat u 4
                let left$u = panels[left_at + $uu * FOUR_STEPS];
#repeat h PAIRS
                sums$h = add_product(sums$h, left$u, panels[right_at + $hu * PANEL + $uu * FOUR_STEPS]);
#end
#end
            }
        }
#endif
    }

#ifdef KEYS
#repeat h PAIRS
    let ones$h = matrix_quad(matrix, BUCKETS, channel + $hu * 64u);
    store_row(b, first, row4 * 4u, rows, count, kv_head, channel + $hu * 64u, sums$h.a + ones$h);
    store_row(b, first, row4 * 4u + 1u, rows, count, kv_head, channel + $hu * 64u, sums$h.b + ones$h);
    store_row(b, first, row4 * 4u + 2u, rows, count, kv_head, channel + $hu * 64u, sums$h.c + ones$h);
    store_row(b, first, row4 * 4u + 3u, rows, count, kv_head, channel + $hu * 64u, sums$h.d + ones$h);
#end
#else
    // Sums over the 16 invocations of a row.
    workgroupBarrier();
    panels[panel_at(0u, column4, row4)] = mass;
    panels[panel_at(3u, column4, row4)] = own_mass;
    workgroupBarrier();
    let masses = panel_sum(0u, row4);
    let divisor = masses + panel_sum(3u, row4) + last * seen;
    let some = divisor > vec4<f32>();
    let inverse = select(vec4<f32>(), 1.0 / divisor, some);
    let whole = select(vec4<f32>(), vec4<f32>(1.0), some);
    let q_head = kv_head * GROUP + in_group;
#repeat h PAIRS
    let rest$h = last * (matrix_quad(matrix, BUCKETS, channel + $hu * 64u) - seen * mean$h);
    store_row(b, first, row4 * 4u, rows, count, q_head, channel + $hu * 64u,
        (sums$h.a + rest$h - masses.x * mean$h) * inverse.x + whole.x * mean$h);
    store_row(b, first, row4 * 4u + 1u, rows, count, q_head, channel + $hu * 64u,
        (sums$h.b + rest$h - masses.y * mean$h) * inverse.y + whole.y * mean$h);
    store_row(b, first, row4 * 4u + 2u, rows, count, q_head, channel + $hu * 64u,
        (sums$h.c + rest$h - masses.z * mean$h) * inverse.z + whole.z * mean$h);
    store_row(b, first, row4 * 4u + 3u, rows, count, q_head, channel + $hu * 64u,
        (sums$h.d + rest$h - masses.w * mean$h) * inverse.w + whole.w * mean$h);
#end
#endif
}

#ifdef KEYS
// Rows of padding are zero. Ensembles after the first add (`flags` = 1).
fn store_row(b: u32, first: u32, row: u32, rows: u32, count: u32, head: u32, channel: u32, x: vec4<f32>) {
    if row < rows {
        let at = p.out_at + b * p.out_batch + ((first + row) * KV_HEADS + head) * VALUE_DIM;
        var sum = select(vec4<f32>(), x, row < count);
        if (p.flags & 1u) == 1u {
            sum += stored_quad(at, channel, VALUE_DIM);
        }
        store_quad(at, channel, VALUE_DIM, sum);
    }
}
#else
fn store_row(b: u32, first: u32, row: u32, rows: u32, count: u32, head: u32, channel: u32, x: vec4<f32>) {
    if row < count {
        let at = p.out_at + b * p.out_batch + ((first + row) * Q_HEADS + head) * VALUE_DIM;
        store_quad(at, channel, VALUE_DIM, x);
    }
}
#endif
