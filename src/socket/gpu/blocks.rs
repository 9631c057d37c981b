//! How the rows of a call share the scratch buffers: what does not fit at once goes through them block by block.

use super::params::Row;
use crate::socket::plan::{CANDIDATES, Geometry, HISTOGRAM_ROW, TABLE_HEADER, score_stride};
use crate::socket::problem::AttendProblem;
use std::ops::Range;

/// Scratch buffers, in the order of [`Load::bytes`].
#[derive(Clone, Copy)]
pub(super) enum Scratch {
    Tables,
    Histogram,
    Scores,
    Candidates,
    Partials,
}

/// What some rows need of the scratch buffers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    pub rows: u64,
    score_words: u64,
    parts: u64,
}

impl Load {
    fn plus(self, other: Self) -> Self {
        Self {
            rows: self.rows + other.rows,
            score_words: self.score_words + other.score_words,
            parts: self.parts + other.parts,
        }
    }

    /// Keys of a selection, in the mean.
    pub fn mean_keys(&self, g: &Geometry) -> u64 {
        self.score_words / (self.rows * g.scores_per_row()).max(1)
    }

    /// Words before the first score: the thresholds.
    pub fn header(&self, g: &Geometry) -> u64 {
        (2 * self.rows * g.scores_per_row()).next_multiple_of(64)
    }

    /// Bytes of each scratch buffer, by [`Scratch`]; those of the selection are 0 where nothing is selected.
    pub fn bytes(&self, g: &Geometry, sparse: bool) -> [u64; 5] {
        let partials = (self.parts * g.part_stride() as u64 * 4).max(16);
        if !sparse {
            return [0, 0, 0, 0, partials];
        }
        let score_rows = self.rows * g.scores_per_row();
        let table_words = self.rows * g.tables_per_row() * (TABLE_HEADER + g.table_entries()) as u64;
        [
            table_words * 4,
            score_rows * HISTOGRAM_ROW as u64 * 4,
            (self.header(g) + self.score_words) * 4,
            score_rows * CANDIDATES as u64 * 8,
            partials,
        ]
    }
}

/// Rows that go through the scratch buffers together: all of some sequences, or some of one sequence.
#[derive(Clone, Debug)]
pub(super) struct Block {
    pub sequences: Range<usize>,
    /// Query tokens of each of them.
    pub tokens: Range<usize>,
    pub load: Load,
}

/// The blocks of a call, and its rows with their places in the scratch buffers.
pub(super) struct Blocks {
    pub rows: Vec<Row>,
    pub blocks: Vec<Block>,
    /// Tokens per workgroup, or per step of one that takes several chunks.
    pub chunk: usize,
}

impl Blocks {
    /// Blocks as large as `limit` bytes per scratch buffer allow. A row that is too large alone has a block of its own,
    /// whose buffers are then refused. `slots` are the sequences' places in the state buffer.
    pub fn new(g: &Geometry, problem: &AttendProblem, sparse: bool, limit: u64, slots: impl Fn(usize) -> u32) -> Self {
        let tq = problem.tq;
        let chunk = g.chunk(problem.tokens());
        let load = |visible: usize| Load {
            rows: 1,
            score_words: if sparse { score_stride(visible) as u64 * g.scores_per_row() } else { 0 },
            parts: (visible.div_ceil(chunk) * g.num_q_heads) as u64,
        };
        let fits = |load: Load| load.bytes(g, sparse).iter().all(|&bytes| bytes <= limit);
        let mut rows = Vec::with_capacity(problem.rows.len());
        let mut blocks: Vec<Block> = Vec::new();
        for (b, state) in problem.seqs.iter().enumerate() {
            let of_sequence = &problem.rows[b * tq..(b + 1) * tq];
            let whole = of_sequence.iter().fold(Load::default(), |sum, row| sum.plus(load(row.visible)));
            let joins = |last: &Block| last.tokens == (0..tq) && fits(last.load.plus(whole));
            let split = !fits(whole);
            if split || !blocks.last().is_some_and(joins) {
                let tokens = if split { 0..0 } else { 0..tq };
                blocks.push(Block { sequences: b..b + 1, tokens, load: Load::default() });
            }
            for (t, row) in of_sequence.iter().enumerate() {
                let own = load(row.visible);
                let full = |last: &Block| !last.tokens.is_empty() && !fits(last.load.plus(own));
                if split && blocks.last().is_some_and(full) {
                    blocks.push(Block { sequences: b..b + 1, tokens: t..t, load: Load::default() });
                }
                let Some(block) = blocks.last_mut() else { continue };
                block.sequences.end = b + 1;
                block.tokens.end = block.tokens.end.max(t + 1);
                rows.push(Row {
                    visible: row.visible as u32,
                    heavy: row.heavy.min(u32::MAX as usize) as u32,
                    slot: slots(b),
                    unindexed: u32::from(state.indexed < state.len),
                    score_base: block.load.score_words as u32,
                    part_base: block.load.parts as u32,
                    part_count: row.visible.div_ceil(chunk) as u32,
                    reserved: 0,
                });
                block.load = block.load.plus(own);
            }
        }
        Self { rows, blocks, chunk }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]

    use super::*;
    use crate::socket::config::{Budget, CacheShape, SocketConfig};
    use crate::socket::problem::{CacheSpec, Kind, SeqState, query_rows};
    use crate::tensor::DType;

    fn plan(lens: &[usize], tq: usize, limit: u64) -> (Geometry, Blocks) {
        let shape = CacheShape { num_q_heads: 8, num_kv_heads: 2, head_dim: 32, value_dim: 32, dtype: DType::F32 };
        let config = SocketConfig { budget: Budget::Tokens(8), ..SocketConfig::fast() };
        let g = Geometry::new(&CacheSpec { config: config.clone(), shape, page_tokens: 64 });
        let seqs: Vec<_> = lens.iter().map(|&len| SeqState { len, indexed: len }).collect();
        let rows = query_rows(&config, Kind::Sparse, &seqs, tq);
        let (kind, op, output, want_selection) = (Kind::Sparse, "decode", DType::F32, false);
        let problem = AttendProblem { kind, op, tq, rows, seqs, scale: 1.0, output, want_selection };
        (g, Blocks::new(&g, &problem, true, limit, |b| b as u32))
    }

    /// Each row in one block, in order; blocks within the limit; rows of a block side by side in the scratch buffers.
    fn check(lens: &[usize], tq: usize, limit: u64) -> Vec<(Range<usize>, Range<usize>)> {
        let (g, plan) = plan(lens, tq, limit);
        assert_eq!(plan.rows.len(), lens.len() * tq);
        let mut next = 0;
        for block in &plan.blocks {
            assert!(block.load.bytes(&g, true).iter().all(|&bytes| bytes <= limit), "{block:?}");
            let (mut score, mut part) = (0, 0);
            assert!(block.sequences.len() == 1 || block.tokens == (0..tq));
            for b in block.sequences.clone() {
                for t in block.tokens.clone() {
                    let row = &plan.rows[next];
                    assert_eq!((next, row.slot, row.score_base, row.part_base), (b * tq + t, b as u32, score, part));
                    score += score_stride(row.visible as usize) as u32 * 8;
                    part += row.part_count * 8;
                    next += 1;
                }
            }
            assert_eq!(block.load.rows, (block.sequences.len() * block.tokens.len()) as u64);
        }
        assert_eq!(next, plan.rows.len());
        plan.blocks.into_iter().map(|block| (block.sequences, block.tokens)).collect()
    }

    #[test]
    fn blocks_fit_and_cover_every_row() {
        // One row's candidates take 1 MiB here.
        let lens: Vec<_> = (0..23).map(|b| 70 + b * 9).collect();
        assert_eq!(check(&lens, 1, 1 << 30), [(0..23, 0..1)]);
        assert_eq!(check(&lens, 1, 10 << 20), [(0..10, 0..1), (10..20, 0..1), (20..23, 0..1)]);
        assert_eq!(check(&lens[..3], 5, 10 << 20), [(0..2, 0..5), (2..3, 0..5)]);
        let one = [(0..1, 0..4), (0..1, 4..8), (0..1, 8..9), (1..2, 0..4), (1..2, 4..8), (1..2, 8..9)];
        assert_eq!(check(&[90, 300], 9, 4 << 20), one);
        // Long rows, of which the scores decide.
        let (scores, long) = (check(&[1 << 17; 3], 1, 5 << 20), [(0..1, 0..1), (1..2, 0..1), (2..3, 0..1)]);
        assert_eq!(scores, long);
    }

    #[test]
    fn a_row_too_large_has_a_block_of_its_own() {
        let (g, plan) = plan(&[100, 100], 2, 1 << 16);
        assert_eq!(plan.blocks.len(), 4);
        assert!(plan.blocks.iter().all(|block| block.load.bytes(&g, true)[Scratch::Candidates as usize] > 1 << 16));
    }
}
