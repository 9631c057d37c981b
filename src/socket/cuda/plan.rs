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

    /// Threads of the scorer's blocks.
    pub fn score_threads(&self) -> u32 {
        if self.fast() == Fast::Bytes { 256 } else { 512 }
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
            Fast::Bytes => g.score_rows() * BINS * 4 + g.scoring_heads().div_ceil(4) * g.words * 64 * 4,
        }
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

    pub fn attend_shared(&self, sparse: bool, span: usize) -> usize {
        let (heads, _) = self.head_tiles();
        let results = 4 * heads * (self.g.value_dim.div_ceil(16) * 16 + 4) * 4;
        let tiles = (4 * self.stages(sparse) * self.stage()).max(results);
        tiles + if sparse { CHOSEN * 4 + (span / self.g.page + 2) * 8 } else { 0 }
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

    /// Tokens of a block of the attention over rows of `lens` tokens: whole tiles; of the sparse one a power of two, so that
    /// a block's pages are whole or one.
    pub fn attend_span(&self, lens: impl Iterator<Item = usize> + Clone, sparse: bool) -> usize {
        let (_, tiles) = self.head_tiles();
        let heads = self.g.num_kv_heads * tiles;
        let work = lens.clone().sum::<usize>() * heads;
        if sparse {
            return self.span(work, 2, 16).next_power_of_two().clamp(64, MOST_CHOSEN_SPAN);
        }
        // As many blocks as run at once and none after them, or they would end at different times.
        let together = 2 * self.multiprocessors;
        let blocks = |span: usize| lens.clone().map(|len| len.div_ceil(span)).sum::<usize>() * heads;
        let tiles_of = |tokens: usize| tokens.div_ceil(16).max(1);
        let (mut least, mut most) = (tiles_of(work / together), tiles_of(lens.clone().max().unwrap_or(0)));
        while least < most {
            let middle = least.midpoint(most);
            if blocks(middle * 16) <= together {
                most = middle;
            } else {
                least = middle + 1;
            }
        }
        let span = most * 16;
        // Where they do not fit, or some would have far more to do than others, more of them.
        if blocks(span) > together || 2 * work < span * together {
            return self.span(work, 6, 16).max(256);
        }
        span.max(256)
    }
}
