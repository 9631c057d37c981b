#import params
#import items
#import stored
#import pieces
#import key_scalars
// Sign bits and scalars of many stored keys: one workgroup per (item, tile of 64 tokens, kv head). The projections are
// a tiled matrix product, 64 tokens by 128 planes by 16 channels at a time; each invocation holds 8 by 8 of them.
@group(0) @binding(1) var<storage, read> items: array<Item>;
@group(0) @binding(2) var<storage, read> pages: array<u32>;
@group(0) @binding(3) var<storage, read> k_pages: array<vec4<u32>>;
@group(0) @binding(4) var<storage, read> v_pages: array<vec4<u32>>;
@group(0) @binding(5) var<storage, read> planes: array<f32>;
@group(0) @binding(6) var<storage, read_write> seq_state: array<atomic<u32>>;
@group(0) @binding(7) var<storage, read_write> index_pages: array<u32>;

// Channels of a slice, and in fours.
const SLICE: u32 = 16u;
const QUADS: u32 = SLICE / 4u;
// Planes of a block: whole words of codes.
const HASH_WORDS: u32 = 128u / (TABLES_PER_WORD * PLANES);
const HASH_PLANES: u32 = HASH_WORDS * TABLES_PER_WORD * PLANES;
const HASH_BLOCKS: u32 = (WORDS + HASH_WORDS - 1u) / HASH_WORDS;
// One vector of padding after eight planes keeps four invocations' planes in different banks.
const PLANE_ROW: u32 = 144u;
// Four channels of a key, or of a plane, to a vector.
var<workgroup> keys: array<vec4<f32>, QUADS * 64>;
var<workgroup> weights: array<vec4<f32>, QUADS * PLANE_ROW>;
var<workgroup> words: array<atomic<u32>, 64 * HASH_WORDS>;

fn mean_of(mean_at: u32, channel: u32) -> f32 {
#ifdef CENTER
    return bitcast<f32>(atomicLoad(&seq_state[mean_at + channel]));
#else
    return 0.0;
#endif
}

// Four channels of a key, zero past the last.
fn centered(x: vec4<f32>, mean_at: u32, channel: u32) -> vec4<f32> {
    var y = vec4<f32>();
#repeat c 4
    if channel + $cu < HEAD_DIM {
        y[$c] = x[$c] - mean_of(mean_at, channel + $cu);
    }
#end
    return y;
}

@compute @workgroup_size(WIDTH)
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

    // Two invocations fetch a token; in the product an invocation has tokens `token8` + 8 i and planes `plane8` + j.
    let own_token = local % 64u;
    let own_half = local / 64u;
    let token8 = local % 8u;
    let plane8 = local / 8u * 8u;
    var key_square = 0.0;
    var value_square = 0.0;
#ifdef VALUE_NORM
    for (var piece = own_half; piece < V_PIECES; piece += 2u) {
        let value = v_pages[(row0 + own_token) * V_PIECES + piece];
        value_square += dot(piece_low(value), piece_low(value));
#ifndef KV_F32
        value_square += dot(piece_high(value), piece_high(value));
#endif
    }
#endif
#repeat i 8
    var projections$i = 0.0;
#end
    for (var block = 0u; block < HASH_BLOCKS; block++) {
        for (var i = local; i < 64u * HASH_WORDS; i += WIDTH) {
            atomicStore(&words[i], 0u);
        }
#repeat i 8
#repeat j 8
        var u$i_$j = 0.0;
#end
#end
        for (var slice = 0u; slice < HEAD_DIM; slice += SLICE) {
            workgroupBarrier();
            for (var i = own_half; i < SLICE / PIECE; i += 2u) {
                let piece = min(slice / PIECE + i, K_PIECES - 1u);
                let stored = k_pages[(row0 + own_token) * K_PIECES + piece];
                let channel = slice + i * PIECE;
                let low = centered(piece_low(stored), mean_at, channel);
                keys[i * PIECE / 4u * 64u + own_token] = low;
                if block == 0u {
                    key_square += dot(low, low);
                }
#ifndef KV_F32
                let high = centered(piece_high(stored), mean_at, channel + 4u);
                keys[(i * 2u + 1u) * 64u + own_token] = high;
                if block == 0u {
                    key_square += dot(high, high);
                }
#endif
            }
            let plane = block * HASH_PLANES + local;
            for (var quad = 0u; quad < QUADS; quad++) {
                var weight = vec4<f32>();
                if local < HASH_PLANES && plane < BITS {
#repeat c 4
                    if slice + quad * 4u + $cu < HEAD_DIM {
                        weight[$c] = planes[planes_at + (slice + quad * 4u + $cu) * BITS + plane];
                    }
#end
                }
                weights[quad * PLANE_ROW + local + local / 8u] = weight;
            }
            workgroupBarrier();
            for (var quad = 0u; quad < QUADS; quad++) {
                let weights_at = quad * PLANE_ROW + plane8 + plane8 / 8u;
#repeat j 8
                let w$j = weights[weights_at + $ju];
#end
#repeat i 8
                {
                    let x = keys[quad * 64u + token8 + $iu * 8u];
#repeat c 4
#repeat j 8
                    u$i_$j += x[$c] * w$j[$c];
#end
#end
                }
#end
            }
        }
        // The eight planes lie in one word of codes, or in two that follow each other.
        let first_word = (block * HASH_PLANES + plane8) / (PLANES * TABLES_PER_WORD);
#repeat j 8
        let plane$j = block * HASH_PLANES + plane8 + $ju;
        let exists$j = plane8 + $ju < HASH_PLANES && plane$j < BITS;
        let table$j = plane$j / PLANES;
        let bit$j = select(0u, 1u << (table$j % TABLES_PER_WORD * PLANES + PLANES - 1u - plane$j % PLANES), exists$j);
        let in_first$j = table$j / TABLES_PER_WORD == first_word;
#end
        let words_at = (first_word - block * HASH_WORDS) * 64u + token8;
#repeat i 8
        {
            var codes = 0u;
            var next_codes = 0u;
#repeat j 8
            projections$i += select(0.0, abs(u$i_$j), exists$j);
            let ones$j = select(0u, bit$j, u$i_$j >= 0.0);
            codes |= select(0u, ones$j, in_first$j);
            next_codes |= select(ones$j, 0u, in_first$j);
#end
            if codes != 0u {
                atomicOr(&words[words_at + $iu * 8u], codes);
            }
            if next_codes != 0u {
                atomicOr(&words[words_at + 64u + $iu * 8u], next_codes);
            }
        }
#end
        workgroupBarrier();
        for (var i = local; i < 64u * HASH_WORDS; i += WIDTH) {
            let token = first + i % 64u;
            let word = block * HASH_WORDS + i / 64u;
            if token >= item.hash_start && token < item.hash_end && word < WORDS {
                index_pages[(page_head * INDEX_WORDS + word) * PAGE + in_page + i % 64u] = atomicLoad(&words[i]);
            }
        }
        workgroupBarrier();
    }
#ifdef SCALARS
    // Sums over the groups of planes, in a fixed order.
    keys[local * 2u] = vec4<f32>(projections0, projections1, projections2, projections3);
    keys[local * 2u + 1u] = vec4<f32>(projections4, projections5, projections6, projections7);
    weights[local] = vec4<f32>(key_square, value_square, 0.0, 0.0);
    workgroupBarrier();
    let token = first + own_token;
    if own_half == 0u && token >= item.hash_start && token < item.hash_end {
        var projection_sum = 0.0;
        for (var i = 0u; i < 16u; i++) {
            projection_sum += keys[(i * 8u + own_token % 8u) * 2u + own_token / 32u][own_token / 8u % 4u];
        }
        let squares = weights[own_token] + weights[own_token + 64u];
        let value_norm = sqrt(squares.y);
        let at = in_page + own_token;
        let gain = key_gain(value_norm, squares.x, projection_sum);
        index_pages[(page_head * INDEX_WORDS + WORDS) * PAGE + at] = bitcast<u32>(gain);
        // Gains are never negative, so their bits have their order.
        atomicMax(&seq_state[item.slot * SLOT_WORDS + KV_HEADS * HEAD_DIM + head], bitcast<u32>(gain));
#ifdef BIAS
        index_pages[(page_head * INDEX_WORDS + WORDS + 1u) * PAGE + at] = bitcast<u32>(key_bias(value_norm));
#endif
    }
#endif
}
