// A matrix, `[BUCKETS + 1, VALUE_DIM + 1]` in rows of MATRIX_ROW elements, and the share of its channels that a workgroup
// takes, PAIRS runs of 64.
const MATRIX: u32 = (BUCKETS + 1u) * MATRIX_ROW;
const CHANNELS: u32 = 64u * PAIRS;
const CHANNEL_BLOCKS: u32 = (VALUE_DIM + CHANNELS - 1u) / CHANNELS;

// Where what a chunk's rows read stands: the sums before its run of RUN chunks, or after it; and in a matrix of its own
// those of the run's chunks before it, or after it, if there are any.
struct Sums {
    run: u32,
    part: u32,
    has_part: bool,
}

fn part_of(unit: u32, chunk: u32) -> u32 {
    return p.parts_at + (unit * p.chunks + chunk) * MATRIX;
}

// With one matrix a unit there are no parts.
fn sums_of(unit: u32, chunk: u32, has_part: bool) -> Sums {
    let run = (unit * p.slots + min(chunk / RUN, p.slots - 1u)) * MATRIX;
    return Sums(run, part_of(unit, chunk), has_part && p.parts_at != 0u);
}

fn sums_before(unit: u32, chunk: u32) -> Sums {
    return sums_of(unit, chunk, chunk % RUN != 0u);
}

fn sums_after(unit: u32, chunk: u32, length: u32) -> Sums {
    return sums_of(unit, chunk, (chunk + 1u) % RUN != 0u && (chunk + 1u) * CHUNK < length);
}
