// Tokens of one sequence to store and hash; the Rust twin is `Item`.
struct Item {
    batch_row: u32,
    start: u32,
    count: u32,
    first_page: u32,
    pages_at: u32,
    slot: u32,
    hash_start: u32,
    hash_end: u32,
}
