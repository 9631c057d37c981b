// Rows of one kv head: (sequence, token, head of the group) as one number.
fn row_sequence(row: u32) -> u32 {
    return row / PER_HEAD / p.tokens;
}

fn row_token(row: u32) -> u32 {
    return row / PER_HEAD % p.tokens;
}

// (sequence, token) a few tokens after another, without a division.
fn token_after(origin: vec2<u32>, offset: u32) -> vec2<u32> {
    var x = vec2<u32>(origin.x, origin.y + offset);
    while x.y >= p.tokens {
        x.x++;
        x.y -= p.tokens;
    }
    return x;
}

fn row_head(row: u32, head: u32) -> u32 {
    return (p.head + head) * PER_HEAD + row % PER_HEAD;
}

// Its place in the buffers of the piece.
fn row_place(row: u32, head: u32) -> u32 {
    return (row / PER_HEAD * p.heads + head) * PER_HEAD + row % PER_HEAD;
}

// Gradient of w·x, from that of β·t. t begins at `k_at`.
fn projection_gradient(place: u32, plane: u32, beta: f32) -> f32 {
    let hash = t[p.k_at + place * BITS + plane];
    return beta * s[place * S_STRIDE + plane] * (1.0 - hash * hash);
}
