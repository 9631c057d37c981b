// Segments of SEGMENT matrices, which the scan adds up first. A matrix is of CHUNK tokens here, those of a run.
const MATRIX: u32 = (BUCKETS + 1u) * MATRIX_ROW;

fn segment_count() -> u32 {
    return (p.chunks + SEGMENT - 1u) / SEGMENT;
}

// Chunks that hold tokens.
fn chunks_of(b: u32) -> u32 {
    return min(p.chunks, (length_of(b) + CHUNK - 1u) / CHUNK);
}
