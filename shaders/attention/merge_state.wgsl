#import params
#import output
#import elements
// Merges two attention results over disjoint key sets: one invocation per word of the merged o.
@group(0) @binding(1) var<storage, read> o1: array<u32>;
@group(0) @binding(2) var<storage, read> lse1: array<u32>;
@group(0) @binding(3) var<storage, read> o2: array<u32>;
@group(0) @binding(4) var<storage, read> lse2: array<u32>;
@group(0) @binding(5) var<storage, read_write> o: array<u32>;
@group(0) @binding(6) var<storage, read_write> lse: array<u32>;

const EMPTY: u32 = 0xff800000u;

fn element(word: u32, index: u32, dtype: u32) -> f32 {
    // An empty set's o may hold anything; it has no weight, and NaN must not come of it.
    if dtype == 0u {
        return finite_or_zero(word);
    }
    let half = (word >> ((index & 1u) * 16u)) & 0xffffu;
    if dtype == 1u {
        return finite_or_zero(widen_half(half));
    }
    return finite_or_zero(half << 16u);
}

fn first(at: u32) -> f32 {
    return element(o1[at >> select(1u, 0u, O1 == 0u)], at, O1);
}

fn second(at: u32) -> f32 {
    return element(o2[at >> select(1u, 0u, O2 == 0u)], at, O2);
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let word = group_index(group) * 256u + local;
    if word >= p.items {
        return;
    }
#ifdef OUT_F32
    const PER_WORD: u32 = 1u;
#else
    const PER_WORD: u32 = 2u;
#endif
    var values: array<f32, 2>;
    for (var i = 0u; i < PER_WORD; i++) {
        let channel_index = word * PER_WORD + i;
        let row = channel_index / p.width;
        let channel = channel_index % p.width;
        if row < p.entries {
            let bits1 = lse1[p.sink + row];
            let bits2 = lse2[p.window + row];
            let some1 = bits1 != EMPTY;
            let some2 = bits2 != EMPTY;
            // Finite stand-ins; the weights of empty sets are set to zero below.
            let a = bitcast<f32>(select(0u, bits1, some1));
            let b = bitcast<f32>(select(0u, bits2, some2));
            let top = select(select(b, a, some1), max(a, b), some1 && some2);
            let weight1 = select(0.0, exp(a - top), some1);
            let weight2 = select(0.0, exp(b - top), some2);
            let sum = weight1 + weight2;
            let scale = select(0.0, 1.0 / sum, some1 || some2);
            values[i] = (weight1 * first(p.in_offset + channel_index) + weight2 * second(p.in2_offset + channel_index)) * scale;
            if channel == 0u {
                lse[row] = select(EMPTY, bitcast<u32>(top + log(sum)), some1 || some2);
            }
        }
    }
#ifdef OUT_F32
    o[word] = bitcast<u32>(values[0]);
#else
    o[word] = pack_pair(values[0], values[1]);
#endif
}
