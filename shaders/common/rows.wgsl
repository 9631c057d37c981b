// One query token of one sequence; the Rust twin is `Row`.
struct Row {
    visible: u32,
    heavy: u32,
    slot: u32,
    unindexed: u32,
    score_base: u32,
    part_base: u32,
    part_count: u32,
    reserved: u32,
}

// Scores of one head of a row, padded so that rows start on whole cache lines.
fn score_stride(visible: u32) -> u32 {
    return (visible + 63u) & 0xffffffc0u;
}

fn in_base(row: Row, token: u32) -> bool {
    return token < p.sink || token + p.window >= row.visible;
}
