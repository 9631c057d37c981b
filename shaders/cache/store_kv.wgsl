#import params
#import elements
#import items
// Copies appended keys and values into their pages, bits kept; NaN and infinities become zero and are counted.
// One invocation per 16-byte piece of a row of k or v.
@group(0) @binding(1) var<storage, read> k: array<u32>;
@group(0) @binding(2) var<storage, read> v: array<u32>;
@group(0) @binding(3) var<storage, read> items: array<Item>;
@group(0) @binding(4) var<storage, read> pages: array<u32>;
@group(0) @binding(5) var<storage, read_write> k_pages: array<vec4<u32>>;
@group(0) @binding(6) var<storage, read_write> v_pages: array<vec4<u32>>;
@group(0) @binding(7) var<storage, read_write> counters: array<atomic<u32>>;

#ifdef KV_F32
const PER_WORD: u32 = 1u;
#else
const PER_WORD: u32 = 2u;
#endif

fn clean(bits: u32) -> u32 {
#ifdef KV_F32
    if !is_finite_bits(bits) {
        atomicAdd(&counters[0], 1u);
        return 0u;
    }
    return bits;
#endif
#ifdef KV_BF16
    if (bits & 0x7f80u) == 0x7f80u {
        atomicAdd(&counters[0], 1u);
        return 0u;
    }
    return bits;
#endif
#ifdef KV_F16
    if (bits & 0x7c00u) == 0x7c00u {
        atomicAdd(&counters[0], 1u);
        return 0u;
    }
    return bits;
#endif
}

fn k_element(at: u32) -> u32 {
#ifdef KV_F32
    return clean(k[at]);
#else
    return clean((k[at >> 1u] >> ((at & 1u) * 16u)) & 0xffffu);
#endif
}

fn v_element(at: u32) -> u32 {
#ifdef KV_F32
    return clean(v[at]);
#else
    return clean((v[at >> 1u] >> ((at & 1u) * 16u)) & 0xffffu);
#endif
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    const PIECES = K_PIECES + V_PIECES;
    let index = group_index(group) * 256u + local;
    let piece = index % PIECES;
    let head = index / PIECES % KV_HEADS;
    let token = index / (PIECES * KV_HEADS) % p.max_count;
    let item_index = index / (PIECES * KV_HEADS) / p.max_count;
    if item_index >= p.items {
        return;
    }
    let item = items[item_index];
    if token >= item.count {
        return;
    }
    let position = item.start + token;
    let page = pages[item.pages_at + position / PAGE - item.first_page];
    if page >> 20u != p.slab {
        return;
    }
    let row = ((page & 0xfffffu) * KV_HEADS + head) * PAGE + position % PAGE;
    var words = vec4<u32>();
    if piece < K_PIECES {
        let source_at = p.in_offset + item.batch_row * p.in_batch + token * p.in_token + head * p.in_head;
        for (var i = 0u; i < 4u * PER_WORD; i++) {
            let channel = piece * 4u * PER_WORD + i;
            if channel < HEAD_DIM {
                words[i / PER_WORD] |= k_element(source_at + channel) << (i % PER_WORD * 16u);
            }
        }
        k_pages[row * K_PIECES + piece] = words;
    } else {
        let source_at = p.in2_offset + item.batch_row * p.in2_batch + token * p.in2_token + head * p.in2_head;
        for (var i = 0u; i < 4u * PER_WORD; i++) {
            let channel = (piece - K_PIECES) * 4u * PER_WORD + i;
            if channel < VALUE_DIM {
                words[i / PER_WORD] |= v_element(source_at + channel) << (i % PER_WORD * 16u);
            }
        }
        v_pages[row * V_PIECES + piece - K_PIECES] = words;
    }
}
