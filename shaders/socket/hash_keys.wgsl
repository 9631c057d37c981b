#import params
#import items
#import stored
#import key_scalars
// Sign bits and scalars of many stored keys: one workgroup per (item, tile of 64 tokens, kv head). The projections are
// a tiled matrix product, 64 tokens by 64 planes by 16 channels at a time; each invocation holds 4 by 4 of them.
@group(0) @binding(1) var<storage, read> items: array<Item>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> k_pages: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> v_pages: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> planes: array<f32>;
@group(0) @binding(6) var<storage, read_write> seq_state: array<atomic<u32>>;
@group(0) @binding(7) var<storage, read_write> index_pages: array<u32>;

const SLICE: u32 = 16u;
var<workgroup> keys: array<vec4<f32>, 256>;
var<workgroup> weights: array<vec4<f32>, 256>;
var<workgroup> words: array<atomic<u32>, 64 * WORDS_PER_BLOCK>;
var<workgroup> sums: array<vec4<f32>, 256>;

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let head = index % KV_HEADS;
    let tile = index / KV_HEADS % p.max_count;
    let item = items[index / KV_HEADS / p.max_count];
    let first = item.hash_start / 64u * 64u + tile * 64u;
    if first >= item.hash_end {
        return;
    }
    let page = pages[item.pages_at + first / PAGE - item.first_page];
    if page >> 20u != p.slab {
        return;
    }
    let in_page = first % PAGE;
    let page_head = (page & 0xfffffu) * KV_HEADS + head;
    let row0 = page_head * PAGE + in_page;
    let mean_at = item.slot * SLOT_WORDS + head * HEAD_DIM;
    let planes_at = select(0u, head, p.planes_stride > 0u) * p.planes_stride;

    let token4 = local % 16u;
    let plane4 = local / 16u;
    var projection_sums = vec4<f32>();
    var key_squares = vec4<f32>();
    // Blocks hold whole words of codes, at most 64 planes' worth of columns.
    for (var block = 0u; block < BLOCKS; block++) {
        for (var i = local; i < 64u * WORDS_PER_BLOCK; i += 256u) {
            atomicStore(&words[i], 0u);
        }
        var u0 = vec4<f32>();
        var u1 = vec4<f32>();
        var u2 = vec4<f32>();
        var u3 = vec4<f32>();
        for (var slice = 0u; slice < HEAD_DIM; slice += SLICE) {
            workgroupBarrier();
            // keys[channel][token / 4] and weights[channel][plane / 4], four values an invocation each.
            let channel = slice + local / 16u;
            var x = vec4<f32>();
            var w = vec4<f32>();
            if channel < HEAD_DIM {
#ifdef CENTER
                let mean = bitcast<f32>(atomicLoad(&seq_state[mean_at + channel]));
#else
                let mean = 0.0;
#endif
                for (var i = 0u; i < 4u; i++) {
                    let row = row0 + (local % 16u) * 4u + i;
                    x[i] = stored_element(k_pages[row * K_PIECES + channel / PIECE], channel % PIECE) - mean;
                    let plane = block * BLOCK_PLANES + (local % 16u) * 4u + i;
                    if (local % 16u) * 4u + i < BLOCK_PLANES && plane < BITS {
                        w[i] = planes[planes_at + channel * BITS + plane];
                    }
                }
            }
            keys[local] = x;
            weights[local] = w;
            workgroupBarrier();
            for (var c = 0u; c < SLICE; c++) {
                let x4 = keys[c * 16u + token4];
                let w4 = weights[c * 16u + plane4];
                u0 += x4 * w4.x;
                u1 += x4 * w4.y;
                u2 += x4 * w4.z;
                u3 += x4 * w4.w;
                if block == 0u && plane4 == 0u {
                    key_squares += x4 * x4;
                }
            }
        }
        for (var j = 0u; j < 4u; j++) {
            let column = plane4 * 4u + j;
            let plane = block * BLOCK_PLANES + column;
            if column < BLOCK_PLANES && plane < BITS {
                var u = u0;
                if j == 1u { u = u1; }
                if j == 2u { u = u2; }
                if j == 3u { u = u3; }
                projection_sums += abs(u);
                let table = plane / PLANES;
                let bit = table % TABLES_PER_WORD * PLANES + PLANES - 1u - plane % PLANES;
                let word = table / TABLES_PER_WORD - block * WORDS_PER_BLOCK;
                for (var i = 0u; i < 4u; i++) {
                    if u[i] >= 0.0 {
                        atomicOr(&words[word * 64u + token4 * 4u + i], 1u << bit);
                    }
                }
            }
        }
        workgroupBarrier();
        for (var i = local; i < 64u * WORDS_PER_BLOCK; i += 256u) {
            let token = first + i % 64u;
            let word = block * WORDS_PER_BLOCK + i / 64u;
            if token >= item.hash_start && token < item.hash_end && word < WORDS {
                index_pages[(page_head * INDEX_WORDS + word) * PAGE + in_page + i % 64u] = atomicLoad(&words[i]);
            }
        }
        workgroupBarrier();
    }
#ifdef SCALARS
    // Sums over the 16 groups of planes, in a fixed order.
    sums[local] = projection_sums;
    workgroupBarrier();
    if plane4 == 0u {
        var total = vec4<f32>();
        for (var i = 0u; i < 16u; i++) {
            total += sums[i * 16u + token4];
        }
        for (var i = 0u; i < 4u; i++) {
            let token = first + token4 * 4u + i;
            if token >= item.hash_start && token < item.hash_end {
                var square = 0.0;
#ifdef VALUE_NORM
                for (var piece = 0u; piece < V_PIECES; piece++) {
                    let words = v_pages[(row0 + token4 * 4u + i) * V_PIECES + piece];
                    for (var c = 0u; c < PIECE; c++) {
                        let x = stored_element(words, c);
                        square += x * x;
                    }
                }
#endif
                let value_norm = sqrt(square);
                let at = in_page + token4 * 4u + i;
                let gain = key_gain(value_norm, key_squares[i], total[i]);
                index_pages[(page_head * INDEX_WORDS + WORDS) * PAGE + at] = bitcast<u32>(gain);
                // Gains are never negative, so their bits have their order.
                atomicMax(&seq_state[item.slot * SLOT_WORDS + KV_HEADS * HEAD_DIM + head], bitcast<u32>(gain));
#ifdef BIAS
                index_pages[(page_head * INDEX_WORDS + WORDS + 1u) * PAGE + at] = bitcast<u32>(key_bias(value_norm));
#endif
            }
        }
    }
#endif
}
