//! Sizes, and how a call is cut into pieces: arithmetic without a device.
#![cfg_attr(not(feature = "wgpu"), allow(dead_code))]

use crate::race::config::{RaceConfig, RaceShape};
use crate::tensor::DType;
use std::ops::Range;

/// Tokens of a chunk: inside it a query meets keys one by one, before it by their sum.
pub(crate) const CHUNK: usize = 64;

/// Chunks of a run: the scan takes its sum, and what is before a chunk inside it is kept beside that.
pub(crate) const RUN: usize = 4;

/// Runs of a segment, whose sum the scan takes as one.
pub(crate) const SEGMENT: usize = 16;

/// Columns of a matrix that a workgroup of the scan takes.
pub(crate) const SCAN_WIDTH: usize = 8;

/// What shapes the kernels: all that their text depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Geometry {
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    pub dtype: DType,
    pub tables: usize,
    pub planes: usize,
    pub ensembles: usize,
    pub ratio: bool,
}

impl Geometry {
    pub fn new(config: &RaceConfig, shape: &RaceShape) -> Self {
        Self {
            num_q_heads: shape.num_q_heads,
            num_kv_heads: shape.num_kv_heads,
            group: shape.group(),
            head_dim: shape.head_dim,
            value_dim: shape.value_dim,
            dtype: shape.dtype,
            tables: config.tables,
            planes: config.planes,
            ensembles: config.ensembles,
            ratio: config.normalization.is_ratio(),
        }
    }

    /// Buckets S of one ensemble.
    pub fn buckets(&self) -> usize {
        self.tables << self.planes
    }

    /// Hyperplanes of one ensemble.
    pub fn bits(&self) -> usize {
        self.tables * self.planes
    }

    /// Hyperplanes of a workgroup that hashes rows, in fours.
    pub fn plane_fours(&self) -> usize {
        self.bits().div_ceil(4).min(8)
    }

    /// Columns of a state and of a chunk's matrix: the channels of v, and the mass.
    pub fn columns(&self) -> usize {
        self.value_dim + 1
    }

    /// Elements of one (sequence, kv head, ensemble) of a state, `[buckets, columns]`.
    pub fn state_unit(&self) -> usize {
        self.buckets() * self.columns()
    }

    /// Elements from one row of a chunk's matrix to the next: whole vectors of four.
    pub fn matrix_row(&self) -> usize {
        self.columns().next_multiple_of(4)
    }

    /// Elements of the matrix of one chunk: a row per bucket and one for the sums over all keys.
    pub fn matrix(&self) -> usize {
        (self.buckets() + 1) * self.matrix_row()
    }

    /// (sequence, kv head, ensemble) triples of one sequence.
    pub fn units(&self) -> usize {
        self.num_kv_heads * self.ensembles
    }

    /// Bytes of one sequence's state: pairs of f32.
    pub fn state_bytes(&self) -> u64 {
        self.units() as u64 * self.state_unit() as u64 * 8
    }

    /// Pairs of 32 channels that an invocation of the tiled kernels owns: a workgroup takes 64 channels for each.
    pub fn channel_pairs(&self) -> usize {
        self.value_dim.div_ceil(64).min(2)
    }

    /// Runs of 64 channels of q and k that a workgroup takes.
    pub fn head_pairs(&self) -> usize {
        self.head_dim.div_ceil(64).min(2)
    }

    /// Workgroups that share the channels of v.
    pub fn channel_blocks(&self) -> usize {
        self.value_dim.div_ceil(64 * self.channel_pairs())
    }

    /// Query heads that a step works on at a time: what fits workgroup memory, with the key.
    pub fn step_heads(&self) -> usize {
        // Sums of all invocations; then of each row its channels, its hash and its weights of 256 buckets.
        let fixed = 256 * 12 + 64;
        let row = self.head_dim * 4 + self.bits() * 8 + 256 * 4;
        let room = (16 << 10) - fixed - row;
        (room / row).clamp(1, 4).min(self.group)
    }

    /// Bytes that a pass over `tokens` tokens moves at least, each tensor once: q, k, v and o; backward the gradient of
    /// o in place of o, and the `gradients` of q, k and v.
    pub fn least_bytes(&self, tokens: u64, gradients: Option<DType>) -> u64 {
        let (of_q, of_o) = (self.num_q_heads * self.head_dim, self.num_q_heads * self.value_dim);
        let inputs = of_q + self.num_kv_heads * (self.head_dim + self.value_dim);
        let gradients = gradients.map_or(0, |dtype| inputs * dtype.size());
        tokens * ((inputs + of_o) * self.dtype.size() + gradients) as u64
    }

    /// Bytes that a step of one token of `batch` sequences moves at least: their states too, read and written where each
    /// step `adds` its token, else the high parts read.
    pub fn step_bytes(&self, batch: u64, adds: bool) -> u64 {
        let states = batch * self.state_bytes();
        self.least_bytes(batch, None) + if adds { 2 * states } else { states / 2 }
    }

    /// Channels of v that a block of CUDA's step takes: few or many.
    #[cfg(feature = "cuda")]
    pub fn step_channels(&self) -> [usize; 2] {
        [32, self.value_dim.next_power_of_two().clamp(32, 128)]
    }

    /// Tiles of 64 buckets.
    pub fn bucket_tiles(&self) -> usize {
        self.buckets().div_ceil(64)
    }
}

/// The centring constant of a hash with P = `planes`: 1 where it is so flat that the weights' common part would drown
/// what depends on the query, 0 where weights differ so much that taking that part away would cancel.
pub(crate) fn centre(beta: f32, planes: usize) -> f32 {
    let smallest = 2.0 / (1.0 + (2.0 * f64::from(beta)).exp());
    if smallest.powi(planes as i32) >= 1.0 / 64.0 { 1.0 } else { 0.0 }
}

/// What one piece may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Budget {
    /// Bytes of the largest storage binding.
    pub binding: u64,
    /// Bytes of the chunks' matrices.
    pub matrices: u64,
    /// (token, kv head) pairs, in whole chunks.
    pub rows: usize,
}

impl Budget {
    pub fn new(binding: u64) -> Self {
        // 2^18 rows keep a large GPU busy, and a small one for less than its driver's patience.
        Self { binding, matrices: binding.min(320 << 20), rows: 1 << 18 }
    }
}

/// Some tokens of some sequences; its heads are worked on in blocks of `heads` kv heads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    pub sequences: Range<usize>,
    pub tokens: Range<usize>,
    pub heads: usize,
}

impl Piece {
    /// Chunks of a sequence.
    pub fn chunks(&self) -> usize {
        self.tokens.len().div_ceil(CHUNK)
    }

    /// Runs of a sequence.
    pub fn runs(&self) -> usize {
        self.chunks().div_ceil(RUN)
    }
}

/// Cuts a call into pieces, tokens ascending within a sequence. `Err` is the number of bytes that the smallest piece
/// would need in one binding.
pub(crate) fn pieces(g: &Geometry, budget: &Budget, batch: usize, tokens: usize) -> Result<Vec<Piece>, u64> {
    let matrix = (g.matrix() * 4) as u64;
    // Rows of t of a chunk and kv head: its keys and the queries of its group.
    let hashes = (CHUNK * (g.group + 1) * g.bits() * 4) as u64;
    // The largest input or output of a token.
    let (q, kv) = (g.num_q_heads, g.num_kv_heads);
    let widest = [q * g.head_dim, q * g.value_dim, kv * g.head_dim, kv * g.value_dim].into_iter().max().unwrap_or(1);
    // A binding may begin up to an alignment before its first element.
    let chunk_row = (CHUNK * widest * 4) as u64 + 512;
    // A matrix is a segment of its own at least, in pairs.
    let needed = (2 * matrix).max(hashes).max(chunk_row).max(g.state_bytes());
    if needed > budget.binding {
        return Err(needed);
    }
    // (sequence, kv head, chunk) triples of a piece; at least one, whatever the budget. There are as many runs at most.
    let cells = (budget.matrices / (2 * matrix)).min(budget.binding / hashes).min((budget.rows / CHUNK) as u64).max(1);
    // (sequence, chunk) pairs whose inputs can be bound.
    let bound = budget.binding / chunk_row;
    let heads = g.num_kv_heads.min(cells as usize);
    let pairs = (cells as usize / g.num_kv_heads).max(1).min(bound as usize);
    let chunks = tokens.div_ceil(CHUNK).max(1);
    let sequences = (pairs / chunks).min((budget.binding / g.state_bytes()) as usize).max(1);
    let step = (pairs / sequences).min(chunks) * CHUNK;
    let mut all = Vec::new();
    for b in (0..batch).step_by(sequences) {
        for first in (0..tokens).step_by(step) {
            let (sequences, tokens) = (b..(b + sequences).min(batch), first..(first + step).min(tokens));
            all.push(Piece { sequences, tokens, heads });
        }
    }
    Ok(all)
}

/// What one piece of the window may take.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WindowBudget {
    /// Bytes of the largest storage binding.
    pub binding: u64,
    /// (query, key) pairs.
    pub pairs: usize,
}

impl WindowBudget {
    pub fn new(binding: u64) -> Self {
        // Of 256 channels, some 10¹¹ multiplications a dispatch: a fraction of a second on a small GPU.
        Self { binding, pairs: 1 << 28 }
    }
}

/// As [`pieces`] for the window of `window` tokens: queries are read with the keys before them, and `widest` elements are
/// bound of a token at most. A sequence's ring takes `ring` bytes.
pub(crate) fn window_pieces(
    num_q_heads: usize,
    window: usize,
    widest: usize,
    ring: u64,
    WindowBudget { binding, pairs }: WindowBudget,
    batch: usize,
    tokens: usize,
) -> Result<Vec<Piece>, u64> {
    // A binding may begin up to an alignment before its first element.
    let row = (widest * 4) as u64;
    let needed = (window as u64).saturating_mul(row) + 512;
    if needed > binding {
        return Err(needed);
    }
    let room = ((binding - 512) / row) as usize - (window - 1);
    let worth = (pairs / num_q_heads / (window + 32)).next_multiple_of(32).max(32);
    let step = room.min(worth).min(tokens).max(1);
    let sequences = if step < tokens { 1 } else { room.min(worth) / (tokens + window) };
    let sequences = sequences.min((binding / ring.max(1)) as usize).max(1);
    let mut all = Vec::new();
    for b in (0..batch).step_by(sequences) {
        for first in (0..tokens).step_by(step) {
            let (sequences, tokens) = (b..(b + sequences).min(batch), first..(first + step).min(tokens));
            all.push(Piece { sequences, tokens, heads: 0 });
        }
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;

    fn geometry(heads: (usize, usize), dims: (usize, usize), tables: usize, planes: usize) -> Geometry {
        Geometry {
            num_q_heads: heads.0,
            num_kv_heads: heads.1,
            group: heads.0 / heads.1,
            head_dim: dims.0,
            value_dim: dims.1,
            dtype: DType::F32,
            tables,
            planes,
            ensembles: 1,
            ratio: true,
        }
    }

    #[test]
    fn flat_hashes_are_centred_and_sharp_ones_not() {
        let flat = (1.0 / 128f64.sqrt()) as f32;
        for planes in 1..=8 {
            assert_eq!((centre(flat, planes), centre(8.0, planes)), (1.0, 0.0));
        }
        assert_eq!((centre(1.0, 2), centre(1.0, 4)), (1.0, 0.0));
        assert_eq!(centre(f32::MAX, 1), 0.0);
    }

    #[test]
    fn least_bytes_count_each_tensor_once() {
        let g = geometry((8, 2), (64, 32), 2, 3);
        let (q, o, kv) = (8 * 64, 8 * 32, 2 * (64 + 32));
        assert_eq!(g.least_bytes(10, None), 10 * 4 * (q + o + kv));
        assert_eq!(g.least_bytes(10, Some(DType::F32)), 10 * 4 * (q + o + kv + q + kv));
        assert_eq!(g.least_bytes(10, Some(DType::Bf16)), 10 * (4 * (q + o + kv) + 2 * (q + kv)));
        assert_eq!(g.step_bytes(3, true), 3 * (4 * (q + o + kv) + 2 * g.state_bytes()));
        assert_eq!(g.step_bytes(3, false), 3 * (4 * (q + o + kv) + g.state_bytes() / 2));
    }

    #[test]
    fn pieces_cover_each_token_once_in_order() {
        for (heads, dims, tables, planes) in [
            ((8, 2), (64, 64), 4, 4),
            ((1, 1), (1, 1), 1, 1),
            ((64, 64), (128, 512), 16, 8),
            ((512, 512), (8, 8), 64, 6),
        ] {
            let g = geometry(heads, dims, tables, planes);
            for (batch, tokens) in [(1, 1), (3, 64), (7, 65), (2, 100_000), (300, 1), (5, 4097)] {
                for rows in [64, 1000, 1 << 16] {
                    let budget = Budget { rows, ..Budget::new((4 << 30) - 4) };
                    let mut next = vec![0; batch];
                    for piece in pieces(&g, &budget, batch, tokens).unwrap() {
                        assert!(piece.heads >= 1 && piece.heads <= g.num_kv_heads);
                        let cells = piece.sequences.len() * piece.chunks() * piece.heads;
                        assert!(cells * CHUNK <= rows.max(CHUNK));
                        assert!((cells * g.matrix() * 4) as u64 <= budget.matrices.max((g.matrix() * 4) as u64));
                        assert!(piece.sequences.len() as u64 * g.state_bytes() <= budget.binding);
                        for b in piece.sequences {
                            assert_eq!(next[b], piece.tokens.start);
                            next[b] = piece.tokens.end;
                        }
                    }
                    assert!(next.iter().all(|&n| n == tokens));
                }
            }
        }
    }

    #[test]
    fn what_no_binding_holds_is_told() {
        let g = geometry((64, 64), (128, 512), 16, 8);
        assert_eq!(pieces(&g, &Budget::new(128 << 20), 1, 1), Err(g.state_bytes()));
    }
}
