// What a row of a chunk meets of the chunk's other rows: a query the keys up to its own token, with KEYS a key the
// queries from its own on.

// Products of rows that meet; zero for others. With queries, columns past `count` are met by rows past it alone, of
// which nobody keeps anything.
fn met_by_rows(x: Block, row4: u32, columns: vec4<u32>, count: u32) -> Block {
#repeat r 4
    let row$r = vec4<u32>(row4 * 4u + $ru);
#end
#ifdef KEYS
    let inside = columns < vec4<u32>(count);
    return Block(
        select(vec4<f32>(), x.a, inside & (columns >= row0)),
        select(vec4<f32>(), x.b, inside & (columns >= row1)),
        select(vec4<f32>(), x.c, inside & (columns >= row2)),
        select(vec4<f32>(), x.d, inside & (columns >= row3)));
#else
    return Block(
        select(vec4<f32>(), x.a, columns <= row0),
        select(vec4<f32>(), x.b, columns <= row1),
        select(vec4<f32>(), x.c, columns <= row2),
        select(vec4<f32>(), x.d, columns <= row3));
#endif
}

// Which of the four quads of steps from `start` on four rows meet: the first, and the one after the last. Of the quad
// that is their own, each row meets a part.
fn quads_met(row4: u32, start: u32) -> vec2<u32> {
    let own = row4 - min(row4, start / 4u);
#ifdef KEYS
    return vec2<u32>(own, select(0u, 4u, row4 * 4u < start + 16u));
#else
    return vec2<u32>(0u, select(0u, min(own + 1u, 4u), row4 * 4u >= start));
#endif
}
