// A page of a sequence; the Rust twin is `Entry`.
struct Entry {
    sequence: u32,
    logical: u32,
    page: u32,
    reserved: u32,
}
