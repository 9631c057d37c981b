// What an invocation works on where each sequence's last tokens, as many as the ring holds, are `pieces` items a kv head.
struct Place {
    b: u32,
    token: u32,
    kv_head: u32,
    piece: u32,
    is_inside: bool,
}

fn place_of(at: u32, pieces: u32) -> Place {
    let count = min(p.window, p.tokens);
    let b = at / (pieces * KV_HEADS) / count;
    if b >= p.batch {
        return Place(0u, 0u, 0u, 0u, false);
    }
    let length = length_of(b);
    let token = max(p.first, length - min(length, p.window)) + at / (pieces * KV_HEADS) % count;
    return Place(b, token, at / pieces % KV_HEADS, at % pieces, token < end_of(b));
}
