// A workgroup's 32 query rows of one kv head: a row is a (token, head of the group) pair, tokens first.
struct Rows {
    b: u32,
    kv_head: u32,
    // The first row, counted from the dispatch's first token.
    first: u32,
    // The first and the last token of those that there are; none where the last is before the first.
    first_token: i32,
    last_token: i32,
    // The end of the sequence's tokens.
    end: u32,
}

fn rows_of(index: u32) -> Rows {
    let tiles = (p.tokens * GROUP + 31u) / 32u;
    let first = index / KV_HEADS % tiles * 32u;
    let b = index / KV_HEADS / tiles;
    let end = end_of(b);
    let last = min(i32(end) - 1, i32(p.first + (first + 31u) / GROUP));
    return Rows(b, index % KV_HEADS, first, i32(p.first + first / GROUP), last, end);
}

fn token_of(rows: Rows, row: u32) -> u32 {
    return p.first + (rows.first + row) / GROUP;
}

fn head_of(rows: Rows, row: u32) -> u32 {
    return rows.kv_head * GROUP + (rows.first + row) % GROUP;
}

// The first position that any of the rows sees.
fn first_key(rows: Rows) -> i32 {
    return max(rows.first_token + 1 - i32(p.window), -i32(past_of(rows.b)));
}

fn sees(token: u32, position: i32, b: u32) -> bool {
    return position <= i32(token) && position > i32(token) - i32(p.window) && position >= -i32(past_of(b));
}

// Products q·k of the rows with the keys from position `first` on, up to `last`.
fn logits_of(rows: Rows, first: i32, row8: u32, column: u32) -> vec4<f32> {
    var logits = vec4<f32>();
    for (var slice = 0u; slice < HEAD_DIM; slice += 32u) {
        let channel = slice + column;
        var x = vec4<f32>();
        if channel < HEAD_DIM {
            for (var i = 0u; i < 4u; i++) {
                let row = row8 * 4u + i;
                let token = token_of(rows, row);
                if token < rows.end {
                    x[i] = input_element(input_at(rows.b, token - p.in_first, head_of(rows, row)) + channel);
                }
            }
        }
        workgroupBarrier();
        left[left_at(column, row8)] = x;
        for (var i = row8; i < 32u; i += 8u) {
            var y = 0.0;
            if channel < HEAD_DIM && first + i32(i) <= rows.last_token {
                y = key_element(rows.b, first + i32(i), rows.kv_head, channel);
            }
            right[square_at(column, i)] = y;
        }
        workgroupBarrier();
        logits += square_product(row8, column);
    }
    return logits;
}
