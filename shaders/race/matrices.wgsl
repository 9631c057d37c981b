// A chunk's matrix, `[BUCKETS + 1, VALUE_DIM + 1]` in rows of MATRIX_ROW elements, and the share of its channels that a
// workgroup takes, PAIRS runs of 64.
const MATRIX: u32 = (BUCKETS + 1u) * MATRIX_ROW;
const CHANNELS: u32 = 64u * PAIRS;
const CHANNEL_BLOCKS: u32 = (VALUE_DIM + CHANNELS - 1u) / CHANNELS;
