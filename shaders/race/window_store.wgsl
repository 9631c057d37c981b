#import window_params
#import window_last
#import input
// The last keys and values of a call into their slots of the ring, one word for each invocation.
@group(0) @binding(3) var<storage, read> values: array<u32>;
@group(0) @binding(4) var<storage, read_write> ring: array<u32>;

#ifdef IN_F32
const PER_WORD: u32 = 1u;
#else
const PER_WORD: u32 = 2u;
#endif
#ifdef IN_BF16
const EXPONENT: u32 = 0x7f80u;
#endif
#ifdef IN_F16
const EXPONENT: u32 = 0x7c00u;
#endif
const WORDS: u32 = RING_ROW / PER_WORD;

// The bits of an element of the row, k's channels first; NaN and infinities are stored as what they are read as, zero.
fn bits_of(b: u32, token: u32, kv_head: u32, channel: u32) -> u32 {
    var word = 0u;
    var at = 0u;
    if channel < HEAD_DIM {
        at = input_at(b, token - p.in_first, kv_head) + channel;
        word = input[input_word(at)];
    } else if channel < HEAD_DIM + VALUE_DIM {
        let row = b * p.in3_batch + (token - p.in_first) * p.in3_token + kv_head * p.in3_head;
        at = p.in3_offset + row + channel - HEAD_DIM;
        word = values[input_word(at)];
    }
#ifdef IN_F32
    return select(0u, word, is_finite_bits(word));
#else
    let bits = (word >> ((at & 1u) * 16u)) & 0xffffu;
    return select(0u, bits, (bits & EXPONENT) != EXPONENT);
#endif
}

@compute @workgroup_size(256)
fn main(@builtin(workgroup_id) group: vec3<u32>, @builtin(local_invocation_index) local: u32) {
    let index = group_index(group);
    if index >= p.groups {
        return;
    }
    let place = place_of(index * 256u + local, WORDS);
    if !place.is_inside {
        return;
    }
    let b = place.b;
    let token = place.token;
    let kv_head = place.kv_head;
    let word = place.piece;
    let to = ring_row(b, i32(token), kv_head) / PER_WORD + word;
#ifdef IN_F32
    ring[to] = bits_of(b, token, kv_head, word);
#else
    ring[to] = bits_of(b, token, kv_head, word * 2u) | (bits_of(b, token, kv_head, word * 2u + 1u) << 16u);
#endif
}
