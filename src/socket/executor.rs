//! What a backend must do. The public cache checks and plans; executors store, hash and attend.
//!
//! A further executor (CUDA) implements [`Executor`] and joins the match in [`crate::Device`]; nothing public moves.

use crate::engine::{Recording, WarmUp};
use crate::error::Result;
use crate::socket::problem::{AppendRow, AttendProblem, SeqState};
use crate::tensor::{DType, Tensor, TensorView};

/// Result of attention.
#[derive(Clone, Debug)]
pub struct Attended {
    /// `[batch, query token, num_q_heads, value_dim]`.
    pub o: Tensor,
    /// Natural log of the sum of the exponentiated scaled logits, `[batch, query token, num_q_heads]`, f32.
    pub lse: Tensor,
    /// Where asked for.
    pub selection: Option<Selection>,
}

/// The keys that were attended.
#[derive(Clone, Debug)]
pub struct Selection {
    /// `[batch, query token, heads, width]`, I32, ascending, padded with −1. `heads` is `num_q_heads`, or
    /// `num_kv_heads` under [`crate::SelectionScope::PerGroup`].
    pub indices: Tensor,
    /// Score of each selected key, same shape, f32; 0 in padding. Keys of rows that are attended densely because
    /// their keys are not hashed yet have score 0.
    pub scores: Tensor,
}

/// Bytes a cache holds, by part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Keys.
    pub keys: u64,
    /// Values.
    pub values: u64,
    /// Packed sign bits.
    pub bits: u64,
    /// Per-key scalars of the scoring.
    pub scalars: u64,
    /// Hyperplanes, means, tables and scratch space.
    pub workspace: u64,
}

impl Memory {
    /// Sum of all parts.
    pub fn total(&self) -> u64 {
        self.keys + self.values + self.bits + self.scalars + self.workspace
    }
}

/// Time of one stage of a call.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StageTime {
    /// What ran.
    pub stage: &'static str,
    /// Nanoseconds, by the GPU's own clock; by the host's on the CPU path.
    pub nanoseconds: f64,
}

/// One sequence in its backend-free form, as it is saved: all row-major, little endian.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct SequenceData {
    pub state: SeqState,
    /// `[len, num_kv_heads, head_dim]` in the cache's dtype.
    pub k: Vec<u8>,
    /// `[len, num_kv_heads, value_dim]` in the cache's dtype.
    pub v: Vec<u8>,
    /// `[indexed, num_kv_heads, words]`.
    pub bits: Vec<u32>,
    /// `[indexed, num_kv_heads]`, empty where the scoring has none.
    pub gain: Vec<f32>,
    /// As `gain`.
    pub bias: Vec<f32>,
    /// `[num_kv_heads, head_dim]`, empty while the mean is awaited or without centring.
    pub mean: Vec<f32>,
}

/// A backend of [`crate::SocketCache`]. Sequences are numbered from 0; a failed call leaves storage as it was.
pub(crate) trait Executor: Send {
    /// Sequences it can hold at once.
    fn max_sequences(&self) -> usize {
        usize::MAX
    }
    /// Makes room for `tokens` tokens in each sequence.
    fn reserve(&mut self, tokens: usize) -> Result<()>;
    /// Stores and hashes tokens. Shapes are already checked; host slices are already known to be finite.
    fn append(&mut self, rec: Recording<'_>, k: &TensorView<'_>, v: &TensorView<'_>, rows: &[AppendRow]) -> Result<()>;
    /// Runs attention.
    fn attend(&mut self, rec: Recording<'_>, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Attended>;
    /// Compiles whatever calls with these dtypes need, once it is run.
    fn warm_up(&self, _q: DType, _output: DType) -> WarmUp {
        WarmUp::default()
    }
    /// Runs attention once, timing each stage.
    #[cfg(not(target_arch = "wasm32"))]
    fn profile(&mut self, q: &TensorView<'_>, problem: &AttendProblem) -> Result<Vec<StageTime>>;
    /// Drops the tail of a sequence, down to `state`.
    fn truncate(&mut self, seq: usize, state: SeqState) -> Result<()>;
    /// Adds a sequence at the end that shares the tokens of `seq` (none: an empty one).
    fn fork(&mut self, seq: Option<usize>, state: SeqState) -> Result<()>;
    /// Removes sequence `seq`; later ones move down by one.
    fn remove(&mut self, seq: usize) -> Result<()>;
    /// Bytes held.
    fn memory(&self) -> Memory;
    /// Non-finite elements that arrived from device buffers and were stored as zero.
    fn non_finite_seen(&mut self) -> Result<u64>;
    /// A sequence in its saved form.
    fn export(&mut self, seq: usize, state: SeqState) -> Result<SequenceData>;
    /// Fills the empty last sequence.
    fn import(&mut self, seq: usize, data: &SequenceData) -> Result<()>;
}
