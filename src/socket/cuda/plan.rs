//! Sizes of the CUDA kernels: pure arithmetic.

use crate::socket::config::Scoring;
use crate::socket::plan::Geometry;
use crate::tensor::DType;

/// Bins of the first step of the selection.
pub(crate) const BINS: usize = 2048;
/// Keys near the threshold that a row's list holds; a row with more is searched whole.
pub(crate) const CANDIDATES: usize = 16384;
/// Shared memory of the tables that the scorer in f32 holds at once.
const TABLE_ROOM: usize = 32 << 10;
/// Most rows of one launch: a limit of the grid.
pub(crate) const MOST_ROWS: usize = 32768;
/// Appends of at most this many tokens are hashed one by one, longer ones in tiles.
pub(crate) const STEP_TOKENS: usize = 16;
/// Chosen keys that a block of the attention lists at once, and most tokens that it looks through: it numbers them in 16
/// bits.
const CHOSEN: usize = 2048;
const MOST_CHOSEN_SPAN: usize = 32768;
/// Most tiles of a block of the attention that are copied in runs: more are slower.
pub(crate) const MOST_BULK_STAGES: usize = 5;
/// Tiles up to which a block of the attention is short: measured, see benches/NOTES.md.
const SHORT_BLOCK: usize = 48;
/// Most rounds of keys of a block of the scorer that are copied in runs.
const MOST_SCORE_STAGES: usize = 3;

/// How scores are stored first, see shaders/cuda/socket/score.cu.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Fast {
    /// In f32.
    No,
    /// Products of halves.
    Halves,
    /// Products of bytes on the matrix unit.
    Bytes,
    /// In f32, of codes that are bytes.
    Codes,
}

/// Sizes of one cache on one device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Sizes {
    pub g: Geometry,
    /// Bytes of shared memory that a block can have.
    pub shared: usize,
    pub multiprocessors: usize,
    /// Whether the hardware copies runs of bytes to shared memory by itself.
    pub bulk: bool,
}

impl Sizes {
    fn bits(&self) -> usize {
        self.g.tables * self.g.planes
    }

    pub fn fast(&self) -> Fast {
        let g = &self.g;
        match g.scoring {
            Scoring::SoftCollision if g.planes == 8 && g.scoring_heads() > 1 && g.words <= 32 && g.score_rows() > 1 => {
                Fast::Halves
            }
            Scoring::SignProjection if g.words <= 32 && g.score_rows() <= 8 => Fast::Bytes,
            Scoring::SignProjection => Fast::No,
            _ if g.planes == 8 && g.words <= 16 && g.scoring_heads() <= 4 => Fast::Codes,
            _ => Fast::No,
        }
    }

    /// Threads of the scorer's blocks; with a warp more where keys are copied in `runs`.
    pub fn score_threads(&self, runs: bool) -> u32 {
        let scorers = if self.fast() == Fast::Bytes { 256 } else { 512 };
        if runs { scorers + 32 } else { scorers }
    }

    /// Tables and heads that the scorer in f32 holds at once.
    pub fn score_blocks(&self) -> (usize, usize) {
        let g = &self.g;
        let table = g.digits() * 16 * 4;
        let all = g.tables * table;
        if all <= TABLE_ROOM {
            return (g.tables, (TABLE_ROOM / all).clamp(1, g.scoring_heads().min(4)));
        }
        (TABLE_ROOM / table / g.tables_per_word() * g.tables_per_word(), 1)
    }

    pub fn score_shared(&self) -> usize {
        let g = &self.g;
        match self.fast() {
            Fast::No => {
                let (tables, heads) = self.score_blocks();
                heads * (tables * g.digits() * 16 * 4 + BINS * 4)
            }
            Fast::Halves => g.tables.next_multiple_of(4) * 2 * 16 * 8 + 4 * BINS * 4,
            Fast::Codes => g.scoring_heads() * g.words * 512 + g.score_rows() * BINS * 4,
            Fast::Bytes => self.score_bytes_shared(),
        }
    }

    /// What the scorer of bytes takes beside keys: counts of four heads, and fragments of all.
    fn score_bytes_shared(&self) -> usize {
        let g = &self.g;
        g.score_rows().min(4) * BINS * 4 + g.scoring_heads().div_ceil(4) * g.words * 64 * 4
    }

    /// The index of 256 keys, which is copied in runs.
    fn score_stage(&self) -> usize {
        self.g.index_words() * 256 * 4
    }

    /// Rounds of 256 keys that a block of the scorer holds at once, and their shared memory; where the hardware copies them.
    pub fn score_stages(&self) -> Option<(usize, usize)> {
        if !self.bulk || self.fast() != Fast::Bytes {
            return None;
        }
        // A block takes a KiB more than it asks for, and some for its barriers.
        let stages = |together: usize| {
            let room = (self.shared / together).saturating_sub(self.score_bytes_shared() + 2048);
            (room / self.score_stage()).min(MOST_SCORE_STAGES)
        };
        let stages = [3, 2, 1].map(stages).into_iter().find(|&stages| stages >= 2)?;
        Some((stages, stages * self.score_stage()))
    }

    /// Whether blocks of `span` tokens have their keys copied in runs: a few rounds are faster without.
    pub fn score_in_runs(&self, span: usize) -> bool {
        span >= 8 * 256 && self.score_stages().is_some()
    }

    /// Floats of a query's side of scoring: look-up tables, projections, bounds, shift.
    pub fn table_row(&self) -> usize {
        let blocks = self.g.tables.div_ceil(32 / self.g.planes);
        (self.g.table_entries() + self.bits() + blocks + 1).next_multiple_of(4)
    }

    pub fn query_blocks(&self) -> usize {
        self.g.tables.div_ceil(32 / self.g.planes)
    }

    /// Bytes of a row of 16-bit elements in shared memory.
    fn padded(dim: usize) -> usize {
        dim.div_ceil(16) * 32 + 16
    }

    /// Whether attention runs on the matrix unit: 16-bit keys, and queries that are sums of a few of their type.
    pub fn on_matrix_unit(&self, q: DType) -> bool {
        let g = &self.g;
        let dtypes = g.dtype != DType::F32 && (q == g.dtype || g.dtype == DType::Bf16);
        dtypes
            && g.head_dim <= 256
            && g.value_dim <= 256
            && self.attend_shared(true, 256) + self.attend_static(q) <= self.shared
    }

    /// Query heads of one block, and blocks of a kv head.
    pub fn head_tiles(&self) -> (usize, usize) {
        let tiles = self.g.group.div_ceil(16);
        (self.g.group.div_ceil(tiles), tiles)
    }

    /// Parts of 16 bits that a query or weight in f32 is split into.
    pub fn query_parts(&self, q: DType) -> usize {
        match q {
            _ if q == self.g.dtype => 1,
            DType::F16 => 2,
            _ => 3,
        }
    }

    pub fn weight_parts(&self, output: DType) -> usize {
        if self.g.dtype == DType::F16 || output == DType::Bf16 { 2 } else { 3 }
    }

    /// Static shared memory of the attention: the parts of the query, and what a block counts with.
    fn attend_static(&self, q: DType) -> usize {
        let (heads, _) = self.head_tiles();
        let passes = if heads <= 8 { self.query_parts(q).div_ceil(2) } else { self.query_parts(q) };
        512 + passes * 16 * Self::padded(self.g.head_dim)
    }

    fn stage(&self) -> usize {
        16 * (Self::padded(self.g.head_dim) + Self::padded(self.g.value_dim))
    }

    /// Tiles that a warp of the attention holds in shared memory, so that two blocks share a multiprocessor.
    pub fn stages(&self, sparse: bool) -> usize {
        let list = if sparse { CHOSEN * 4 + 512 } else { 0 };
        // A block takes a KiB more than it asks for.
        let room = (self.shared / 2).saturating_sub(list + 1024);
        (room / (4 * self.stage())).clamp(2, 3)
    }

    /// Results of a block's four warps.
    fn results(&self) -> usize {
        let (heads, _) = self.head_tiles();
        4 * heads * (self.g.value_dim.div_ceil(16) * 16 + 4) * 4
    }

    pub fn attend_shared(&self, sparse: bool, span: usize) -> usize {
        let tiles = (4 * self.stages(sparse) * self.stage()).max(self.results());
        tiles + if sparse { CHOSEN * 4 + (span / self.g.page + 2) * 8 } else { 0 }
    }

    /// A tile of 64 keys that is copied in runs.
    fn bulk_stage(&self) -> usize {
        64 * 2 * (self.g.head_dim + self.g.value_dim)
    }

    /// Whether the device, types and channels let tiles be copied in runs.
    pub fn bulk_fits(&self, q: DType) -> bool {
        let whole = self.g.head_dim.is_multiple_of(64) && self.g.value_dim.is_multiple_of(64);
        self.bulk && self.on_matrix_unit(q) && whole && self.bulk_stages(q, 1) >= 2
    }

    /// Tiles that a block of the attention copied in runs holds, of `together` that share a multiprocessor.
    pub fn bulk_stages(&self, q: DType, together: usize) -> usize {
        // A block takes a KiB more than it asks for.
        let room = (self.shared / together).saturating_sub(self.attend_static(q) + 1024);
        if room < self.results() { 0 } else { (room / self.bulk_stage()).min(MOST_BULK_STAGES) }
    }

    /// Blocks that share a multiprocessor over rows of `tokens` tokens in all, and the tiles that each holds: one where there
    /// is little to read, as fewer parts are to be merged then.
    pub fn bulk_blocks(&self, q: DType, tokens: usize) -> (usize, usize) {
        let tiles = (tokens * self.g.num_kv_heads * self.head_tiles().1).div_ceil(64);
        let two = self.bulk_stages(q, 2);
        if two >= 2 && tiles > 2 * self.multiprocessors * SHORT_BLOCK { (2, two) } else { (1, self.bulk_stages(q, 1)) }
    }

    pub fn bulk_shared(&self, stages: usize) -> usize {
        (stages * self.bulk_stage()).max(self.results())
    }

    /// Keys of a tile of the prompt's attention, as far as registers go.
    pub fn prefill_keys(&self, output: DType) -> usize {
        match (self.g.head_dim.max(self.g.value_dim), self.prefill_weight_parts(output)) {
            (0..=128, _) => 64,
            (_, 1) => 32,
            _ => 16,
        }
    }

    pub fn prefill_weight_parts(&self, output: DType) -> usize {
        match self.g.dtype {
            dtype if dtype == output => 1,
            DType::Bf16 => 3,
            _ => 2,
        }
    }

    pub fn prefill_shared(&self, q: DType, output: DType) -> usize {
        let (k_row, v_row) = (Self::padded(self.g.head_dim), Self::padded(self.g.value_dim));
        self.query_parts(q) * 64 * k_row + 2 * self.prefill_keys(output) * (k_row + v_row)
    }

    pub fn prefill_on_matrix_unit(&self, q: DType, output: DType) -> bool {
        self.on_matrix_unit(q) && self.prefill_shared(q, output) <= self.shared
    }

    /// Whether keys are hashed on the matrix unit, and the shared memory of it.
    pub fn hash_tiles_shared(&self) -> Option<usize> {
        let g = &self.g;
        let one_part = g.dtype == DType::Bf16 && !g.center;
        let words = if g.planes == 8 { 0 } else { g.words * 128 * 4 };
        let shared = 2 * 3 * 32 * Self::padded(g.head_dim) + words;
        let fits = g.dtype != DType::F32 && g.head_dim <= if one_part { 256 } else { 128 } && shared <= self.shared;
        fits.then_some(shared)
    }

    /// Hyperplanes as kernels on the matrix unit read them, per part: planes, channels.
    pub fn plane_parts(&self) -> (usize, usize) {
        (self.bits().next_multiple_of(32), self.g.head_dim.next_multiple_of(16))
    }

    /// Tokens per block, for about `waves` blocks per multiprocessor over all of `work` tokens.
    fn span(&self, work: usize, waves: usize, grain: usize) -> usize {
        work.div_ceil(waves * self.multiprocessors).next_multiple_of(grain).max(grain)
    }

    /// Tokens of a block of the scorer; `tokens` is the sum over all rows.
    pub fn score_span(&self, tokens: usize) -> usize {
        // As many as registers let a multiprocessor have.
        let waves = if self.fast() == Fast::Bytes { 3 } else { 2 };
        self.span(tokens * self.g.num_kv_heads, waves, 512).min(1 << 16)
    }

    pub fn select_span(&self, tokens: usize) -> usize {
        self.span(tokens * self.g.scores_per_row() as usize, 2, 4096)
    }

    /// Tokens of a block of the attention over rows of `lens` tokens: a power of two, so that a block's pages are whole or
    /// one.
    pub fn sparse_span(&self, lens: impl Iterator<Item = usize>) -> usize {
        let (_, tiles) = self.head_tiles();
        let work = lens.sum::<usize>() * self.g.num_kv_heads * tiles;
        self.span(work, 2, 16).next_power_of_two().clamp(64, MOST_CHOSEN_SPAN)
    }

    /// The same of the attention over all keys: whole tiles of `tile` keys, for `together` blocks of a multiprocessor.
    pub fn dense_span(&self, lens: impl Iterator<Item = usize> + Clone, tile: usize, together: usize) -> usize {
        let (_, tiles) = self.head_tiles();
        let heads = self.g.num_kv_heads * tiles;
        let work = lens.clone().sum::<usize>() * heads;
        // As many blocks as run at once and none after them, or they would end at different times.
        let together = together * self.multiprocessors;
        let blocks = |span: usize| lens.clone().map(|len| len.div_ceil(span)).sum::<usize>() * heads;
        let tiles_of = |tokens: usize| tokens.div_ceil(tile).max(1);
        let (mut least, mut most) = (tiles_of(work / together), tiles_of(lens.clone().max().unwrap_or(0)));
        while least < most {
            let middle = least.midpoint(most);
            if blocks(middle * tile) <= together {
                most = middle;
            } else {
                least = middle + 1;
            }
        }
        let span = most * tile;
        // Where they do not fit, or some would have far more to do than others, more of them.
        if blocks(span) > together || 2 * work < span * together {
            return self.span(work, 6, tile).max(256);
        }
        span.max(256)
    }
}
