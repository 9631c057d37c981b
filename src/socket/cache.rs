//! The public cache: checks every call, keeps the lengths, and hands checked problems to its executor.

use crate::device::Device;
use crate::engine::Recording;
use crate::error::{Error, Result};
use crate::socket::config::{CacheShape, SocketConfig};
#[cfg(not(target_arch = "wasm32"))]
use crate::socket::executor::StageTime;
use crate::socket::executor::{Attended, Executor, Memory, SequenceData};
use crate::socket::plan::{Geometry, LeastBytes, prefers_sparse};
use crate::socket::problem::{self, AppendRow, AttendProblem, CacheSpec, Kind, SeqState};
use crate::tensor::{DType, TensorView};

/// Tokens per page unless chosen otherwise.
pub const DEFAULT_PAGE_TOKENS: usize = 1024;

/// Sequences of one cache at most; a GPU may hold fewer.
const MAX_SEQUENCES: usize = 1 << 16;

/// Which attention [`SocketCache::decode_with`] runs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Select by score, then attend.
    #[default]
    Sparse,
    /// Attend to every key.
    Dense,
    /// Dense below the length at which sparse starts to win in our measurements, sparse above.
    Auto,
}

/// Options of one decode call.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct DecodeOptions {
    /// Which attention runs.
    pub mode: Mode,
    /// Logit scale; 1/√`head_dim` unless given.
    pub scale: Option<f32>,
    /// Element type of o; q's unless given.
    pub output: Option<DType>,
    /// Also return the selected indices and their scores, where the sparse path runs.
    pub selection: bool,
}

/// Keys, values and their sign-bit index for a ragged batch of sequences, and attention over them.
///
/// One cache serves one layer. Source: SOCKET, arXiv 2602.06283.
pub struct SocketCache {
    device: Device,
    spec: CacheSpec,
    seqs: Vec<SeqState>,
    executor: Box<dyn Executor>,
}

impl std::fmt::Debug for SocketCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SocketCache").field("spec", &self.spec).field("seqs", &self.seqs).finish_non_exhaustive()
    }
}

impl SocketCache {
    /// An empty cache of `sequences` sequences.
    ///
    /// # Errors
    /// [`Error::Config`] for a field out of range, [`Error::Unsupported`] or [`Error::Limit`] for a shape that the
    /// device cannot take.
    pub fn new(device: &Device, config: SocketConfig, shape: CacheShape, sequences: usize) -> Result<Self> {
        Self::with_page_tokens(device, config, shape, sequences, DEFAULT_PAGE_TOKENS)
    }

    /// As [`SocketCache::new`] with another page size: a power of two from 64 to 65536. Small pages waste less on
    /// many short sequences, large ones scan faster.
    ///
    /// # Errors
    /// As [`SocketCache::new`].
    pub fn with_page_tokens(
        device: &Device,
        config: SocketConfig,
        shape: CacheShape,
        sequences: usize,
        page_tokens: usize,
    ) -> Result<Self> {
        config.validate()?;
        shape.validate()?;
        if !page_tokens.is_power_of_two() || !(64..=65536).contains(&page_tokens) {
            return Err(Error::config("page_tokens", page_tokens, "must be a power of two from 64 to 65536"));
        }
        let spec = CacheSpec { config, shape, page_tokens };
        let executor = device.executor(&spec)?;
        let mut cache = Self { device: device.clone(), spec, seqs: Vec::new(), executor };
        cache.check_sequences("new", sequences)?;
        for _ in 0..sequences {
            cache.add_sequence()?;
        }
        Ok(cache)
    }

    /// The device it lives on.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its configuration.
    pub fn config(&self) -> &SocketConfig {
        &self.spec.config
    }

    /// Its shapes.
    pub fn shape(&self) -> CacheShape {
        self.spec.shape
    }

    /// Tokens per page.
    pub fn page_tokens(&self) -> usize {
        self.spec.page_tokens
    }

    /// Number of sequences.
    pub fn sequences(&self) -> usize {
        self.seqs.len()
    }

    /// Tokens held by a sequence; `None` where there is no such sequence.
    pub fn len(&self, sequence: usize) -> Option<usize> {
        self.seqs.get(sequence).map(|s| s.len)
    }

    /// Whether no sequence holds a token.
    pub fn is_empty(&self) -> bool {
        self.seqs.iter().all(|s| s.len == 0)
    }

    /// Makes room for `tokens` tokens in each sequence, so that appends up to there allocate nothing.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] or [`Error::Limit`]; the cache is unchanged then.
    pub fn reserve(&mut self, tokens: usize) -> Result<()> {
        let (value, limit) = (tokens as u64, 1 << 30);
        if value > limit {
            return Err(Error::Limit { op: "reserve", what: "tokens of a sequence", value, limit });
        }
        self.executor.reserve(tokens)
    }

    /// Compiles every kernel that appends and decodes with queries of dtype `q` and results of dtype `output` need,
    /// concurrently; later calls then compile nothing. Nothing to do on the CPU path. It waits for the compiler;
    /// [`SocketCache::warm_up_async`] does not.
    ///
    /// # Errors
    /// [`Error::Gpu`] where a kernel does not compile, [`Error::DeviceLost`].
    pub fn warm_up(&self, q: DType, output: DType) -> Result<()> {
        self.executor.warm_up(q, output).run()
    }

    /// As [`SocketCache::warm_up`], while the thread that polls the future does other work: the kernels compile on the
    /// threads of rayon's pool, in browsers one by one between polls. The future borrows nothing; calls made before it
    /// is done wait for the kernels that they need.
    ///
    /// # Errors
    /// As [`SocketCache::warm_up`].
    pub fn warm_up_async(&self, q: DType, output: DType) -> impl Future<Output = Result<()>> + Send + use<> {
        self.executor.warm_up(q, output).run_async()
    }

    /// [`Error::Limit`] where `sequences` are more than the device holds at once.
    fn check_sequences(&self, op: &'static str, sequences: usize) -> Result<()> {
        let limit = MAX_SEQUENCES.min(self.executor.max_sequences());
        if sequences > limit {
            return Err(Error::Limit { op, what: "sequences", value: sequences as u64, limit: limit as u64 });
        }
        Ok(())
    }

    fn sequence(&self, op: &'static str, index: usize) -> Result<SeqState> {
        self.seqs.get(index).copied().ok_or(Error::NoSuchSequence { op, index, count: self.seqs.len() })
    }

    fn check_kv(&self, k: &TensorView<'_>, v: &TensorView<'_>, rows: usize) -> Result<()> {
        let op = "append";
        let shape = self.spec.shape;
        let tokens = k.shape()[1];
        for (name, view, dim) in [("k", k, shape.head_dim), ("v", v, shape.value_dim)] {
            if view.dtype() != shape.dtype {
                let expected = format!("{:?}, the cache's", shape.dtype);
                return Err(Error::DType { op, tensor: name, got: view.dtype(), expected });
            }
            view.check(op, name, [Some(rows), Some(tokens), Some(shape.num_kv_heads), Some(dim)])?;
        }
        Ok(())
    }

    fn append_rows(
        &mut self,
        rec: Recording<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        targets: impl Iterator<Item = (usize, usize, usize)>,
    ) -> Result<()> {
        let rows: Vec<_> = targets
            .filter(|&(_, _, count)| count > 0)
            .map(|(seq, row, count)| AppendRow::new(&self.spec.config, seq, row, self.seqs[seq], count))
            .collect();
        for row in &rows {
            let (value, limit) = ((row.start + row.count) as u64, 1 << 30);
            if value > limit {
                return Err(Error::Limit { op: "append", what: "tokens of a sequence", value, limit });
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        self.executor.append(rec, k, v, &rows)?;
        for row in &rows {
            self.seqs[row.seq] = row.after(self.seqs[row.seq]);
        }
        Ok(())
    }

    /// Appends tokens to every sequence: k `[sequences, tokens, num_kv_heads, head_dim]`, v likewise with
    /// `value_dim`. Any number of tokens: a prompt, a chunk of it, or one step.
    ///
    /// # Errors
    /// Shape, dtype, bounds, non-finite values in host slices, limits and memory; the cache is unchanged then.
    pub fn append(&mut self, k: &TensorView<'_>, v: &TensorView<'_>) -> Result<()> {
        let counts = vec![k.shape()[1]; self.seqs.len()];
        self.append_recorded(Recording::Run, k, v, &counts)
    }

    /// As [`SocketCache::append`], of which sequence `b` takes the first `counts[b]` tokens only.
    ///
    /// # Errors
    /// As [`SocketCache::append`]; [`Error::Shape`] where `counts` does not fit.
    pub fn append_ragged(&mut self, k: &TensorView<'_>, v: &TensorView<'_>, counts: &[usize]) -> Result<()> {
        self.append_recorded(Recording::Run, k, v, counts)
    }

    /// As [`SocketCache::append_ragged`], leaving the commands in the caller's encoder. Device-buffer inputs are read
    /// when the caller submits. On the CPU path the work is done at once.
    ///
    /// The cache counts the tokens as held from here on: submit the encoder before another one that reads them.
    ///
    /// # Errors
    /// As [`SocketCache::append_ragged`].
    #[cfg(feature = "wgpu")]
    pub fn append_into(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        counts: &[usize],
    ) -> Result<()> {
        [k, v].into_iter().for_each(TensorView::lend);
        self.append_recorded(Recording::Into(encoder), k, v, counts)
    }

    fn append_recorded(
        &mut self,
        rec: Recording<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        counts: &[usize],
    ) -> Result<()> {
        self.check_kv(k, v, self.seqs.len())?;
        let tokens = k.shape()[1];
        if counts.len() != self.seqs.len() || counts.iter().any(|&c| c > tokens) {
            let expected = format!("{} values of at most {tokens}", self.seqs.len());
            return Err(Error::Shape { op: "append", tensor: "counts", got: counts.to_vec(), expected });
        }
        self.append_rows(rec, k, v, counts.iter().enumerate().map(|(b, &count)| (b, b, count)))
    }

    /// Appends tokens to one sequence: k `[1, tokens, num_kv_heads, head_dim]`, v likewise.
    ///
    /// # Errors
    /// As [`SocketCache::append`]; [`Error::NoSuchSequence`].
    pub fn append_to(&mut self, sequence: usize, k: &TensorView<'_>, v: &TensorView<'_>) -> Result<()> {
        self.sequence("append", sequence)?;
        self.check_kv(k, v, 1)?;
        self.append_rows(Recording::Run, k, v, std::iter::once((sequence, 0, k.shape()[1])))
    }

    /// Adds an empty sequence at the end; returns its index.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`]; [`Error::Limit`] where the device holds no more sequences.
    pub fn add_sequence(&mut self) -> Result<usize> {
        self.check_sequences("add_sequence", self.seqs.len() + 1)?;
        self.executor.fork(None, SeqState::default())?;
        self.seqs.push(SeqState::default());
        Ok(self.seqs.len() - 1)
    }

    /// Adds a sequence at the end that starts with the tokens of `sequence`; full pages are shared, not copied.
    /// Returns its index.
    ///
    /// # Errors
    /// [`Error::NoSuchSequence`], [`Error::OutOfMemory`]; [`Error::Limit`] where the device holds no more sequences.
    pub fn fork(&mut self, sequence: usize) -> Result<usize> {
        let state = self.sequence("fork", sequence)?;
        self.check_sequences("fork", self.seqs.len() + 1)?;
        self.executor.fork(Some(sequence), state)?;
        self.seqs.push(state);
        Ok(self.seqs.len() - 1)
    }

    /// Removes a sequence; later ones move down by one.
    ///
    /// # Errors
    /// [`Error::NoSuchSequence`].
    pub fn remove(&mut self, sequence: usize) -> Result<()> {
        self.sequence("remove", sequence)?;
        self.executor.remove(sequence)?;
        self.seqs.remove(sequence);
        Ok(())
    }

    /// Drops all tokens of a sequence after its first `len`.
    ///
    /// # Errors
    /// [`Error::NoSuchSequence`]; [`Error::Limit`] where the sequence is shorter than `len`.
    pub fn truncate(&mut self, sequence: usize, len: usize) -> Result<()> {
        let state = self.sequence("truncate", sequence)?;
        if len > state.len {
            let (value, limit) = (len as u64, state.len as u64);
            return Err(Error::Limit { op: "truncate", what: "tokens to keep", value, limit });
        }
        let after = problem::truncated(&self.spec.config, state, len);
        self.executor.truncate(sequence, after)?;
        self.seqs[sequence] = after;
        Ok(())
    }

    /// Empties every sequence; their number stays.
    ///
    /// # Errors
    /// As [`SocketCache::truncate`].
    pub fn reset(&mut self) -> Result<()> {
        (0..self.seqs.len()).try_for_each(|s| self.truncate(s, 0))
    }

    /// Bytes held, by part.
    pub fn memory(&self) -> Memory {
        self.executor.memory()
    }

    /// Bytes that decoding one query token per sequence moves at least, where `selected` (key, kv head) pairs are
    /// attended, or all of them, for benches.
    #[doc(hidden)]
    pub fn least_bytes(&self, selected: Option<u64>) -> LeastBytes {
        Geometry::new(&self.spec).least_bytes(self.seqs.iter().map(|s| s.len), selected)
    }

    /// Bytes that appending `tokens` tokens moves at least, for benches.
    #[doc(hidden)]
    pub fn append_bytes(&self, tokens: u64) -> u64 {
        Geometry::new(&self.spec).append_bytes(tokens)
    }

    /// How many NaN or infinite elements arrived from device buffers; they were stored as zero. Host slices with such
    /// values are refused instead.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub fn non_finite_seen(&mut self) -> Result<u64> {
        self.executor.non_finite_seen()
    }

    fn attend(
        &mut self,
        rec: Recording<'_>,
        op: &'static str,
        kind: Kind,
        q: &TensorView<'_>,
        options: &DecodeOptions,
    ) -> Result<Attended> {
        let problem = self.problem(op, kind, q, options)?;
        self.executor.attend(rec, q, &problem)
    }

    fn problem(
        &self,
        op: &'static str,
        kind: Kind,
        q: &TensorView<'_>,
        options: &DecodeOptions,
    ) -> Result<AttendProblem> {
        let shape = self.spec.shape;
        q.check(op, "q", [Some(self.seqs.len()), None, Some(shape.num_q_heads), Some(shape.head_dim)])?;
        let scale = options.scale.unwrap_or((1.0 / (shape.head_dim as f64).sqrt()) as f32);
        if !scale.is_finite() {
            return Err(Error::config("scale", scale, "must be finite"));
        }
        let output = options.output.unwrap_or(q.dtype());
        if !output.is_float() {
            let expected = "F32, F16 or Bf16".into();
            return Err(Error::DType { op, tensor: "o", got: output, expected });
        }
        let tq = q.shape()[1];
        let (value, limit) = (tq as u64, 1 << 30);
        if value > limit {
            return Err(Error::Limit { op, what: "query tokens", value, limit });
        }
        let rows = problem::query_rows(&self.spec.config, kind, &self.seqs, tq);
        let seqs = self.seqs.clone();
        let want_selection = options.selection && kind == Kind::Sparse;
        Ok(AttendProblem { kind, op, tq, rows, seqs, scale, output, want_selection })
    }

    fn kind(&self, mode: Mode) -> Kind {
        let longest = self.seqs.iter().map(|s| s.len).max().unwrap_or(0);
        match mode {
            Mode::Sparse => Kind::Sparse,
            Mode::Dense => Kind::Dense,
            Mode::Auto if prefers_sparse(&self.spec, self.device.path_name(), longest) => Kind::Sparse,
            Mode::Auto => Kind::Dense,
        }
    }

    /// Sparse attention of q `[sequences, Tq, num_q_heads, head_dim]`, whose tokens are the last Tq appended; each
    /// sees the keys up to its own position. A query token before the first key gets o = 0 and lse = −∞.
    ///
    /// # Errors
    /// Shape, dtype, bounds, non-finite values in host slices, memory, lost device.
    pub fn decode(&mut self, q: &TensorView<'_>) -> Result<Attended> {
        self.decode_with(q, &DecodeOptions::default())
    }

    /// As [`SocketCache::decode`] with options.
    ///
    /// # Errors
    /// As [`SocketCache::decode`].
    pub fn decode_with(&mut self, q: &TensorView<'_>, options: &DecodeOptions) -> Result<Attended> {
        self.attend(Recording::Run, "decode", self.kind(options.mode), q, options)
    }

    /// As [`SocketCache::decode_with`], leaving the commands in the caller's encoder; the results can be read once it
    /// is submitted. On the CPU path the work is done at once.
    ///
    /// # Errors
    /// As [`SocketCache::decode`].
    #[cfg(feature = "wgpu")]
    pub fn decode_into(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        q: &TensorView<'_>,
        options: &DecodeOptions,
    ) -> Result<Attended> {
        q.lend();
        self.attend(Recording::Into(encoder), "decode", self.kind(options.mode), q, options)
    }

    /// Exact attention over the same cache: the baseline, the short-context path and the truth.
    ///
    /// # Errors
    /// As [`SocketCache::decode`].
    pub fn dense_decode(&mut self, q: &TensorView<'_>) -> Result<Attended> {
        self.decode_with(q, &DecodeOptions { mode: Mode::Dense, ..Default::default() })
    }

    /// Exact causal attention for a prompt: as [`SocketCache::dense_decode`], tiled for many query tokens.
    ///
    /// # Errors
    /// As [`SocketCache::decode`].
    pub fn prefill(&mut self, q: &TensorView<'_>) -> Result<Attended> {
        self.attend(Recording::Run, "prefill", Kind::Prefill, q, &DecodeOptions::default())
    }

    /// Runs one decode and says how long each stage took.
    ///
    /// # Errors
    /// As [`SocketCache::decode`]; [`Error::Unsupported`] on a GPU without timestamp queries.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn profile_with(&mut self, q: &TensorView<'_>, options: &DecodeOptions) -> Result<Vec<StageTime>> {
        let problem = self.problem("profile", self.kind(options.mode), q, options)?;
        self.executor.profile(q, &problem)
    }

    pub(crate) fn spec(&self) -> &CacheSpec {
        &self.spec
    }

    pub(crate) fn export(&mut self, sequence: usize) -> Result<SequenceData> {
        let state = self.sequence("save", sequence)?;
        self.executor.export(sequence, state)
    }

    /// Adds a sequence holding `data`.
    pub(crate) fn import(&mut self, data: &SequenceData) -> Result<()> {
        let seq = self.add_sequence()?;
        self.executor.import(seq, data)?;
        self.seqs[seq] = data.state;
        Ok(())
    }
}
