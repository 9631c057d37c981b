// A chunk's matrix, `[BUCKETS + 1, VALUE_DIM + 1]`, and the share of its channels that a workgroup takes: an invocation
// owns two channels, 32 apart, in each of PAIRS runs of 64.
const ROWS: u32 = BUCKETS + 1u;
const COLUMNS: u32 = VALUE_DIM + 1u;
const MATRIX: u32 = ROWS * COLUMNS;
const TILES: u32 = (BUCKETS + 31u) / 32u;
const CHANNELS: u32 = 64u * PAIRS;
const CHANNEL_BLOCKS: u32 = (VALUE_DIM + CHANNELS - 1u) / CHANNELS;
