//! Sizes and decisions of SOCKET decoding: pure arithmetic, no device words.

// The CPU path takes only a few of them.
#![cfg_attr(not(feature = "wgpu"), allow(dead_code))]

use crate::socket::config::{Scoring, SelectionScope};
use crate::socket::problem::CacheSpec;
use crate::tensor::DType;

/// From which length on [`crate::Mode::Auto`] runs the sparse path, one row for each measurement.
struct Crossover {
    /// As [`crate::Device::path_name`] has it.
    path: &'static str,
    /// Sign bits of a key at most.
    bits: usize,
    /// Whether one selection serves a query group.
    per_group: bool,
    /// kv heads at least: with more of them dense attention takes longer, and the choice of the keys does not.
    kv_heads: usize,
    tokens: usize,
}

const fn row(path: &'static str, bits: usize, per_group: bool, kv_heads: usize, tokens: usize) -> Crossover {
    Crossover { path, bits, per_group, kv_heads, tokens }
}

const ANY: usize = usize::MAX;

/// The shortest length measured in `benches/NOTES.md` from which on sparse won at every longer one too. The first row
/// that fits decides; one selection for a group is never slower than one per head, so rows of the latter serve both.
const CROSSOVERS: [Crossover; 11] = [
    row("cpu", 128, false, 1, 4 << 10),
    row("cpu", ANY, false, 1, 16 << 10),
    // H200, 32/32 and 32/8 heads of 128 channels.
    row("gpu", 128, false, 32, 16 << 10),
    row("gpu", ANY, false, 32, 16 << 10),
    row("gpu", 128, true, 1, 32 << 10),
    row("gpu", 128, false, 1, 128 << 10),
    row("gpu", ANY, false, 1, 512 << 10),
    row("cuda", 128, false, 32, 16 << 10),
    row("cuda", ANY, false, 32, 16 << 10),
    row("cuda", 128, false, 1, 32 << 10),
    row("cuda", ANY, false, 1, 64 << 10),
];

/// Whether [`crate::Mode::Auto`] runs the sparse path at this length.
pub(crate) fn prefers_sparse(spec: &CacheSpec, path: &str, len: usize) -> bool {
    let fits = |row: &&Crossover| {
        row.path == path
            && spec.config.layout().bits() <= row.bits
            && (!row.per_group || spec.config.scope == SelectionScope::PerGroup)
            && spec.shape.num_kv_heads >= row.kv_heads
    };
    CROSSOVERS.iter().find(fits).is_some_and(|row| len >= row.tokens)
}

/// Workgroup memory that the default variants stay within: what WebGPU promises everywhere.
pub(crate) const WORKGROUP_MEMORY: usize = 16384;
/// Workgroup memory that variants for devices with more stay within, so that several workgroups share a core.
pub(crate) const MOST_WORKGROUP_MEMORY: usize = 49152;
/// Bins of the first digit of the radix selection.
pub(crate) const BINS: usize = 1024;
/// Words of a histogram row: the bins, the numbers of candidates and of keys above them, the candidates' bounds.
pub(crate) const HISTOGRAM_ROW: usize = BINS + 4;
/// Candidates a row's list holds; a row with more is searched whole.
pub(crate) const CANDIDATES: usize = 16384;
/// Workgroups that share the exact scoring of a row's candidates.
pub(crate) const RESCORE_SLICES: usize = 16;
/// Workgroups of scoring that keep every core of a large GPU busy.
pub(crate) const SCORE_GROUPS: u64 = 1024;
/// Workgroups of sparse attention that keep every core of a large GPU busy, and those of dense attention in their place: its
/// last ones run longer while other cores have nothing to do.
pub(crate) const ATTEND_GROUPS: u64 = 512;
pub(crate) const DENSE_PER_SPARSE: u64 = 4;
/// Chunks that a workgroup of attention takes at most.
const MOST_ATTEND_SPAN: u64 = 8;
/// Chunks that a workgroup scores at most: their keys are counted in 16 bits.
const MOST_SPAN: u64 = 4;
/// Chunks that a workgroup looks through at most: it numbers them in 6 bits.
const MOST_CANDIDATES_SPAN: u64 = 16;
/// Rows of more keys than these have their candidates scored again by a dispatch of its own.
pub(crate) const RESCORE_FUSED_KEYS: u64 = 64 << 10;
/// Header words (bounds, shift, errors) before a query's look-up tables.
pub(crate) const TABLE_HEADER: usize = 8;
/// Appends of at most this many tokens are hashed one by one, longer ones in tiles.
pub(crate) const STEP_TOKENS: usize = 16;
/// Tokens of one append dispatch.
pub(crate) const APPEND_TOKENS: usize = 32768;

/// Sizes of one cache that storage and kernels share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Geometry {
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub dtype: DType,
    pub page: usize,
    pub tables: usize,
    pub planes: usize,
    /// Stored words per key in the index: sign bits, then gain and bias where there are.
    pub words: usize,
    pub gain: bool,
    pub bias: bool,
    pub value_norm: bool,
    pub center: bool,
    pub normalize: bool,
    pub scoring: Scoring,
    pub per_group: bool,
    pub disjoint: bool,
    /// Neighbouring invocations that may exchange values directly; 0 where none may.
    pub subgroup: usize,
    /// Bytes of workgroup memory.
    pub workgroup_memory: usize,
    /// Whether coarse scores may be taken first, see [`Geometry::coarse`].
    pub allow_coarse: bool,
}

impl Geometry {
    pub fn new(spec: &CacheSpec) -> Self {
        let (config, shape) = (&spec.config, &spec.shape);
        let scalars = config.scalars();
        Self {
            num_q_heads: shape.num_q_heads,
            num_kv_heads: shape.num_kv_heads,
            group: shape.group(),
            head_dim: shape.head_dim,
            value_dim: shape.value_dim,
            dtype: shape.dtype,
            page: spec.page_tokens,
            tables: config.tables,
            planes: config.planes,
            words: config.layout().words(),
            gain: scalars.gain,
            bias: scalars.bias,
            value_norm: config.value_norm,
            center: config.center.is_some(),
            normalize: config.normalize_query,
            scoring: config.scoring,
            per_group: config.scope == SelectionScope::PerGroup,
            disjoint: config.rule == crate::socket::config::Rule::Disjoint,
            subgroup: 0,
            workgroup_memory: WORKGROUP_MEMORY,
            allow_coarse: false,
        }
    }

    /// Elements of one 16-byte piece of a stored row.
    pub fn piece(&self) -> usize {
        16 / self.dtype.size()
    }

    pub fn k_pieces(&self) -> usize {
        self.head_dim.div_ceil(self.piece())
    }

    pub fn v_pieces(&self) -> usize {
        self.value_dim.div_ceil(self.piece())
    }

    pub fn index_words(&self) -> usize {
        self.words + usize::from(self.gain) + usize::from(self.bias)
    }

    /// Bytes of one page: keys, values, index.
    pub fn page_bytes(&self) -> [u64; 3] {
        let rows = (self.num_kv_heads * self.page) as u64;
        [rows * self.k_pieces() as u64 * 16, rows * self.v_pieces() as u64 * 16, rows * self.index_words() as u64 * 4]
    }

    /// Words of one sequence's state: means, and the largest gain per kv head.
    pub fn slot_words(&self) -> usize {
        self.num_kv_heads * (self.head_dim + 1)
    }

    /// Sequences whose states fit one binding of `limit` bytes.
    pub fn max_sequences(&self, limit: u64) -> usize {
        let fitting = limit / (self.slot_words() as u64 * 4);
        usize::try_from(fitting).unwrap_or(usize::MAX)
    }

    pub fn digits(&self) -> usize {
        self.planes.div_ceil(4)
    }

    pub fn table_entries(&self) -> usize {
        self.tables * self.digits() * 16
    }

    pub fn tables_per_word(&self) -> usize {
        32 / self.planes
    }

    /// A linear scoring of a group's mean needs the tables of the mean query alone.
    pub fn mean_query(&self) -> bool {
        self.per_group && self.scoring == Scoring::SignProjection
    }

    /// Whether the scores of a group's heads are averaged key by key.
    pub fn mean_score(&self) -> bool {
        self.per_group && !self.mean_query()
    }

    /// Look-up tables per kv head.
    pub fn scoring_heads(&self) -> usize {
        if self.mean_query() { 1 } else { self.group }
    }

    /// Selections per kv head.
    pub fn score_rows(&self) -> usize {
        if self.per_group { 1 } else { self.group }
    }

    /// Selections of one query token.
    pub fn scores_per_row(&self) -> u64 {
        (self.num_kv_heads * self.score_rows()) as u64
    }

    /// Look-up tables of one query token.
    pub fn tables_per_row(&self) -> u64 {
        (self.num_kv_heads * self.scoring_heads()) as u64
    }

    /// Floats of one partial result: peak, sum, two spare, the values.
    pub fn part_stride(&self) -> usize {
        4 + self.v_pieces() * self.piece()
    }

    /// Tokens per workgroup of scoring and attention: long chunks where there is enough work for every core, since each
    /// chunk pays for one merge.
    pub fn chunk(&self, tokens: usize) -> usize {
        let chunk = match tokens.saturating_mul(self.num_kv_heads) {
            0..0x4_0000 => 256,
            0x4_0000..0x8_0000 => 512,
            _ => 1024,
        };
        chunk.min(self.page)
    }

    /// Tokens per workgroup of scoring, where attention takes `chunk`: each workgroup first fetches look-up tables.
    pub fn score_chunk(&self, chunk: usize) -> usize {
        (2 * chunk).min(1024).min(self.page)
    }

    /// Chunks that a workgroup scores of `chunks` that there are: it fetches tables and hands over counts once. At least
    /// `busy` workgroups stay, for every core to have some. The mean over heads is kept for one chunk.
    pub fn score_span(&self, chunks: u64, busy: u64) -> u64 {
        if self.mean_score() { 1 } else { (chunks / busy).clamp(1, MOST_SPAN) }
    }

    /// The same of looking for keys near the thresholds, where half as many workgroups are enough.
    pub fn candidates_span(&self, chunks: u64, busy: u64) -> u64 {
        (2 * chunks / busy).clamp(1, MOST_CANDIDATES_SPAN)
    }

    /// Chunks that a workgroup of attention takes one after the other, where attend_rows.wgsl serves: it sets up and merges
    /// once for all of them. At least `busy` workgroups stay in each dispatch, over `tokens` in all sequences: there is one
    /// for each piece of memory, of at most `limit` bytes.
    pub fn attend_span(&self, chunk: usize, tokens: usize, queries: usize, limit: u64, busy: u64) -> u64 {
        let [keys, values, _] = self.page_bytes();
        let bytes = tokens.div_ceil(self.page) as u64 * keys.max(values);
        let chunks = (tokens / chunk) as u64 * (self.num_kv_heads * queries) as u64 / bytes.div_ceil(limit).max(1);
        (chunks / busy).clamp(1, MOST_ATTEND_SPAN)
    }

    /// Every chunk size that [`Geometry::chunk`] may choose.
    pub fn chunks(&self) -> Vec<usize> {
        let mut chunks = [256, 512, 1024].map(|chunk: usize| chunk.min(self.page)).to_vec();
        chunks.dedup();
        chunks
    }

    /// Whether keys are scored in 16 bits, four heads to a look-up, and only those near the threshold exactly. The same
    /// keys are selected, but their scores are not known as well as a caller who asks for them expects.
    pub fn coarse(&self) -> bool {
        let linear = self.scoring == Scoring::SignProjection;
        let product = self.scoring == Scoring::SoftCollision && !self.bias;
        // Half a unit for each entry must leave the sums within 16 bits.
        let few = self.tables * self.digits() <= 1024;
        self.allow_coarse && !self.per_group && self.scoring_heads() > 2 && few && (linear || product)
    }

    /// How the scorer divides its look-up tables.
    pub fn score_blocks(&self, coarse: bool) -> ScoreBlocks {
        if coarse {
            let table_bytes = self.digits() * 16 * 8;
            let whole = self.words * self.tables_per_word();
            let room = self.workgroup_memory - 4 * (BINS * 2 + 32) - 64;
            let tables = (room / table_bytes / self.tables_per_word() * self.tables_per_word()).min(whole);
            return ScoreBlocks { tables, pairs: 2, paired: true };
        }
        let ways = self.scoring_heads().min(2);
        let table_bytes = self.digits() * 16 * 4 * ways;
        let whole = self.words * self.tables_per_word();
        let room = |pairs: usize| {
            let counted = if self.mean_score() { 1 } else { pairs * ways };
            self.workgroup_memory.saturating_sub(counted * (BINS * 2 + 32) + 64) / pairs
        };
        let pairs = if self.scoring_heads() > 2 && whole * table_bytes <= room(2) { 2 } else { 1 };
        let tables = (room(pairs) / table_bytes / self.tables_per_word() * self.tables_per_word()).min(whole);
        ScoreBlocks { tables, pairs, paired: ways == 2 }
    }

    /// How the attention kernel for rows that fit a subgroup divides its work, where it may be used.
    pub fn attend_rows(&self, chunk: usize, sparse: bool) -> Option<AttendRows> {
        let lanes = self.k_pieces().max(self.v_pieces()).next_power_of_two();
        // Queries and sums of these many heads stay in registers.
        let most = if self.piece() == 8 { 4 } else { 8 };
        let heads = self.group.div_ceil(self.group.div_ceil(most));
        let slots = heads.next_power_of_two();
        if lanes > self.subgroup || slots > lanes {
            return None;
        }
        let rows = (lanes / slots).min(if heads > 2 { 4 } else { 8 });
        let width = 128;
        let list = if sparse { 4 * chunk } else { 0 };
        let memory = self.piece() * (width + 4) * 4 + width / lanes * slots * 8 + list + width / self.subgroup * 4;
        let fits = memory + 64 <= WORKGROUP_MEMORY && heads * lanes <= width;
        fits.then_some(AttendRows { width, lanes, heads, slots, rows })
    }

    /// Heads per tile of attention.
    pub fn attend_heads(&self, chunk: usize, sparse: bool) -> usize {
        self.attend_rows(chunk, sparse).map_or_else(|| self.attend_tile(chunk, sparse).0, |plan| plan.heads)
    }

    /// Workgroups that share the channels of one merge.
    pub fn merge_split(&self) -> usize {
        (self.value_dim.div_ceil(4) / 8).max(1)
    }

    /// Heads per tile and keys per tile of the attention kernel, within workgroup memory.
    pub fn attend_tile(&self, chunk: usize, sparse: bool) -> (usize, usize) {
        let fixed = 4096 + if sparse { chunk * 4 + 1024 } else { 0 } + 256;
        let query = self.k_pieces().next_multiple_of(4) * self.piece() * 4;
        for tile in [256, 128, 64] {
            for tiles in 1..=2 {
                let heads = self.group.div_ceil(tiles);
                if heads <= 8 && fixed + heads * (query + tile * 4) <= WORKGROUP_MEMORY {
                    return (heads, tile);
                }
            }
        }
        let mut heads = self.group.min(8);
        while heads > 1 && fixed + heads * (query + 256) > WORKGROUP_MEMORY {
            heads -= 1;
        }
        (heads, 64)
    }

    /// Projections a query block holds in workgroup memory: whole tables, at most 1024.
    pub fn query_block(&self) -> usize {
        1024 / self.planes * self.planes
    }
}

/// Bytes that one decode moves at least: what is read, once, and what is written, once.
#[doc(hidden)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LeastBytes {
    /// The index of every key; 0 where attention is dense.
    pub index: u64,
    /// Keys and values attended.
    pub rows: u64,
    /// Queries and outputs.
    pub ends: u64,
}

impl LeastBytes {
    /// All of it.
    pub fn total(&self) -> u64 {
        self.index + self.rows + self.ends
    }
}

impl Geometry {
    /// Of one query token per sequence over caches of `lens` keys, where `selected` (key, kv head) pairs are attended;
    /// all of them where it is `None`.
    pub fn least_bytes(&self, lens: impl Iterator<Item = usize>, selected: Option<u64>) -> LeastBytes {
        let (batch, keys) = lens.fold((0, 0), |(batch, keys), len| (batch + 1, keys + len as u64));
        let pairs = keys * self.num_kv_heads as u64;
        let row = ((self.k_pieces() + self.v_pieces()) * 16) as u64;
        let ends = batch * (self.num_q_heads * (self.head_dim + self.value_dim) * self.dtype.size()) as u64;
        let index = selected.map_or(0, |_| pairs * self.index_words() as u64 * 4);
        LeastBytes { index, rows: selected.unwrap_or(pairs) * row, ends }
    }

    /// Of taking in `tokens` tokens: keys and values read and written, and their index written.
    pub fn append_bytes(&self, tokens: u64) -> u64 {
        let given = (self.head_dim + self.value_dim) * self.dtype.size();
        let stored = (self.k_pieces() + self.v_pieces()) * 16 + self.index_words() * 4;
        tokens * (self.num_kv_heads * (given + stored)) as u64
    }
}

/// Look-up tables that the scorer holds at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScoreBlocks {
    /// Tables per block: whole words.
    pub tables: usize,
    /// Pairs of heads, or single heads, per pass.
    pub pairs: usize,
    /// Whether entries of two heads lie side by side.
    pub paired: bool,
}

/// How attention over rows that fit a subgroup divides its work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AttendRows {
    /// Invocations of a workgroup.
    pub width: usize,
    /// Neighbours that own one piece of a row each.
    pub lanes: usize,
    /// Heads per tile, and with those that pad them to a power of two.
    pub heads: usize,
    pub slots: usize,
    /// Rows that `lanes` neighbours take at a time.
    pub rows: usize,
}

/// Padded length of one head's scores.
pub(crate) fn score_stride(visible: usize) -> usize {
    visible.div_ceil(64) * 64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::socket::config::{CacheShape, SocketConfig};

    #[test]
    fn states_of_all_sequences_fit_one_binding() {
        let of = |num_kv_heads, head_dim, limit| {
            let shape = CacheShape { num_q_heads: 8, num_kv_heads, head_dim, value_dim: 64, dtype: DType::F32 };
            let g = Geometry::new(&CacheSpec { config: SocketConfig::paper(), shape, page_tokens: 64 });
            let most = g.max_sequences(limit);
            assert!((most * g.slot_words() * 4) as u64 <= limit && ((most + 1) * g.slot_words() * 4) as u64 > limit);
            most
        };
        assert_eq!(of(8, 128, 128 << 20), 32513);
        assert_eq!(of(8, 127, 4096), 1);
        assert_eq!(of(8, 127, 4095), 0);
        assert_eq!(of(2, 64, 128 << 20), 258111);
    }

    #[test]
    fn least_bytes_count_each_part_once() {
        let shape = CacheShape { num_q_heads: 32, num_kv_heads: 8, head_dim: 128, value_dim: 128, dtype: DType::Bf16 };
        let g = Geometry::new(&CacheSpec { config: SocketConfig::paper(), shape, page_tokens: 64 });
        // 256 channels of 2 bytes a pair; 32 query heads of as many.
        let (pairs, ends) = (1000 * 8, 32 * 512);
        assert_eq!(g.least_bytes([1000].into_iter(), None), LeastBytes { index: 0, rows: pairs * 512, ends });
        // 480 bits and the norm of v are 16 words; two sequences have two queries.
        let sparse = g.least_bytes([400, 600].into_iter(), Some(77));
        assert_eq!(sparse, LeastBytes { index: pairs * 64, rows: 77 * 512, ends: 2 * ends });
        assert_eq!(g.append_bytes(1000), pairs * (512 + 512 + 64));
    }

    #[test]
    fn runs_of_chunks_leave_enough_workgroups() {
        let of = |num_kv_heads, tokens, limit, busy| {
            let shape = CacheShape { num_q_heads: 32, num_kv_heads, head_dim: 128, value_dim: 128, dtype: DType::Bf16 };
            let g = Geometry::new(&CacheSpec { config: SocketConfig::fast(), shape, page_tokens: 1024 });
            g.attend_span(1024, tokens, 1, limit, busy)
        };
        let limit = (1 << 31) - 1;
        assert_eq!(of(8, 1 << 17, limit, 1024), 1);
        assert_eq!(of(8, 1 << 19, limit, 1024), 4);
        assert_eq!(of(8, 1 << 19, limit, 2048), 2);
        // In two pieces of memory, and in five.
        assert_eq!(of(8, 1 << 20, limit, 1024), 4);
        assert_eq!(of(32, 1 << 20, limit, 1024), 6);
        assert_eq!(of(32, 1 << 20, 1 << 40, 1024), 8);
        assert_eq!(of(8, 1, limit, 1), 1);
    }

    #[test]
    fn auto_goes_sparse_at_the_measured_lengths() {
        let (head, group) = (SelectionScope::PerHead, SelectionScope::PerGroup);
        let cases = [
            ("cpu", 16, head, 2, 4096),
            ("cpu", 17, head, 2, 16384),
            ("gpu", 16, head, 32, 16384),
            ("gpu", 17, head, 32, 16384),
            ("gpu", 16, group, 31, 32768),
            ("gpu", 16, head, 31, 131072),
            ("gpu", 17, head, 31, 524_288),
            ("cuda", 16, head, 32, 16384),
            ("cuda", 17, head, 32, 16384),
            ("cuda", 16, head, 31, 32768),
            ("cuda", 17, group, 31, 65536),
        ];
        for (row, (path, tables, scope, num_kv_heads, crossover)) in CROSSOVERS.iter().zip(cases) {
            let shape = CacheShape {
                num_q_heads: 2 * num_kv_heads,
                num_kv_heads,
                head_dim: 64,
                value_dim: 64,
                dtype: DType::F32,
            };
            let config = SocketConfig { tables, planes: 8, scope, ..SocketConfig::paper() };
            let spec = CacheSpec { config, shape, page_tokens: 64 };
            assert_eq!((row.path, row.tokens), (path, crossover), "one case for each row");
            assert!(prefers_sparse(&spec, path, crossover), "{path}, {tables} tables, {scope:?}");
            assert!(!prefers_sparse(&spec, path, crossover - 1), "{path}, {tables} tables, {scope:?}");
        }
    }
}
