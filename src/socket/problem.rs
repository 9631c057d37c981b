//! Checked problems: what a call asks of an executor, free of any device's words.

use crate::socket::config::{CacheShape, SocketConfig};
use crate::tensor::DType;

/// State of one sequence that the public cache keeps.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SeqState {
    /// Tokens held.
    pub len: usize,
    /// Tokens hashed: all of them, or none while the mean of the first keys is awaited.
    pub indexed: usize,
}

/// Tokens to append to one sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AppendRow {
    /// Sequence that grows.
    pub seq: usize,
    /// Batch row of k and v that holds the tokens, from token 0 on.
    pub row: usize,
    /// Tokens held before.
    pub start: usize,
    /// Tokens to add; more than zero.
    pub count: usize,
    /// Set where the mean of the first so many keys has to be taken, before hashing.
    pub freeze_mean: Option<usize>,
    /// Tokens to hash once stored.
    pub hash: std::ops::Range<usize>,
}

impl AppendRow {
    pub fn new(config: &SocketConfig, seq: usize, row: usize, state: SeqState, count: usize) -> Self {
        let len = state.len + count;
        let (freeze_mean, hash) = match config.center {
            None => (None, state.indexed..len),
            Some(c) if len < c => (None, 0..0),
            Some(c) if state.indexed == 0 => (Some(c), 0..len),
            Some(_) => (None, state.indexed..len),
        };
        Self { seq, row, start: state.len, count, freeze_mean, hash }
    }

    /// The sequence's state once done.
    pub fn after(&self, before: SeqState) -> SeqState {
        SeqState { len: before.len + self.count, indexed: before.indexed.max(self.hash.end) }
    }
}

/// Sequence state after dropping its tail; below the centring count the mean is awaited anew.
pub(crate) fn truncated(config: &SocketConfig, state: SeqState, len: usize) -> SeqState {
    let indexed = match config.center {
        Some(c) if len < c => 0,
        _ => state.indexed.min(len),
    };
    SeqState { len, indexed }
}

/// Keys that one query token of one sequence sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct QueryRow {
    /// Visible keys: positions `0..visible`.
    pub visible: usize,
    /// Keys to choose by score; `visible` where all keys are attended.
    pub heavy: usize,
}

impl QueryRow {
    /// Whether every visible key is attended.
    pub fn is_dense(self) -> bool {
        self.heavy >= self.visible
    }
}

/// Which attention runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// Select, then attend.
    Sparse,
    /// Attend to all visible keys; few query tokens, keys split over the machine.
    Dense,
    /// Attend to all visible keys; many query tokens, tiled.
    Prefill,
}

/// One attention call over the whole batch.
#[derive(Clone, Debug)]
pub(crate) struct AttendProblem {
    pub kind: Kind,
    pub op: &'static str,
    /// Query tokens per sequence.
    pub tq: usize,
    /// `[batch * tq]`, row-major.
    pub rows: Vec<QueryRow>,
    pub seqs: Vec<SeqState>,
    pub scale: f32,
    pub output: DType,
    pub want_selection: bool,
}

impl AttendProblem {
    pub fn batch(&self) -> usize {
        self.seqs.len()
    }

    /// Keys of all sequences.
    #[cfg(feature = "wgpu")]
    pub fn tokens(&self) -> usize {
        self.seqs.iter().map(|seq| seq.len).sum()
    }

    /// Width of the selected-indices result: the most keys any row selects.
    pub fn selection_width(&self, config: &SocketConfig) -> usize {
        let of = |r: &QueryRow| r.heavy.saturating_add(config.sink).saturating_add(config.window).min(r.visible);
        self.rows.iter().map(of).max().unwrap_or(0).max(1)
    }
}

/// Visible keys of query token `t` of `tq`: the query tokens are the last ones appended.
pub(crate) fn visible(len: usize, tq: usize, t: usize) -> usize {
    (len + t + 1).saturating_sub(tq)
}

/// Builds the rows of a call.
pub(crate) fn query_rows(config: &SocketConfig, kind: Kind, seqs: &[SeqState], tq: usize) -> Vec<QueryRow> {
    let mut rows = Vec::with_capacity(seqs.len() * tq);
    for seq in seqs {
        for t in 0..tq {
            let visible = visible(seq.len, tq, t);
            let heavy = config.heavy(visible);
            let all = kind != Kind::Sparse || seq.indexed < seq.len || config.sink + config.window + heavy >= visible;
            rows.push(QueryRow { visible, heavy: if all { visible } else { heavy } });
        }
    }
    rows
}

/// Everything an executor is made from.
#[derive(Clone, Debug)]
pub(crate) struct CacheSpec {
    pub config: SocketConfig,
    pub shape: CacheShape,
    pub page_tokens: usize,
}
