#import input
// Keys and values by position: those of the call from 0 on, those of the ring before.
#ifndef RING
@group(0) @binding(3) var<storage, read> keys: array<u32>;
@group(0) @binding(4) var<storage, read> values: array<u32>;

fn call_key(b: u32, position: i32, kv_head: u32, channel: u32) -> f32 {
    let row = b * p.in2_batch + (u32(position) - p.in2_first) * p.in2_token + kv_head * p.in2_head;
    let at = p.in2_offset + row + channel;
    return element_of(keys[input_word(at)], at);
}

fn call_value(b: u32, position: i32, kv_head: u32, channel: u32) -> f32 {
    let row = b * p.in3_batch + (u32(position) - p.in2_first) * p.in3_token + kv_head * p.in3_head;
    let at = p.in3_offset + row + channel;
    return element_of(values[input_word(at)], at);
}
#endif
#ifdef RING_AT
@group(0) @binding(RING_BINDING) var<storage, read> ring: array<u32>;

fn ring_element(at: u32) -> f32 {
    return element_of(ring[input_word(at)], at);
}
#endif

fn key_element(b: u32, position: i32, kv_head: u32, channel: u32) -> f32 {
#ifdef RING_AT
    if position < 0 {
        return ring_element(ring_row(b, position, kv_head) + channel);
    }
#endif
#ifdef RING
    return 0.0;
#else
    return call_key(b, position, kv_head, channel);
#endif
}

fn value_element(b: u32, position: i32, kv_head: u32, channel: u32) -> f32 {
#ifdef RING_AT
    if position < 0 {
        return ring_element(ring_row(b, position, kv_head) + HEAD_DIM + channel);
    }
#endif
#ifdef RING
    return 0.0;
#else
    return call_value(b, position, kv_head, channel);
#endif
}
