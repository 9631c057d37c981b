//! Streams: sequences of any length, a segment at a time.
//!
//! A source hands out segments of q, k, v (from host memory, a file, or made on the device), a sink takes what comes of
//! them. Between segments only the state is carried, so memory does not grow with the context. The next segment is read
//! on a thread of its own while one is worked on.
//!
//! Whatever stops a stream (the source, the sink, the caller, a lost device), what was delivered stays delivered and the
//! state stands where delivery ended: the same call goes on from there.

use crate::engine::Recording;
use crate::error::{Error, Result};
use crate::race::attention::{Race, RaceOptions};
use crate::race::executor::{Inputs, Pass};
use crate::race::state::RaceState;
use crate::tensor::{DType, Tensor, TensorView};
use std::ops::{ControlFlow, Range};

/// Why a source or a sink gave up.
pub type StreamFailure = Box<dyn std::error::Error + Send + Sync>;

/// Which tensors of a segment are asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Queries.
    pub q: bool,
    /// Keys.
    pub k: bool,
    /// Values.
    pub v: bool,
    /// The gradient of o.
    pub grad_o: bool,
}

/// Tokens of all sequences, `[batch, token, head, channel]` each; what was not asked for may be left out.
#[derive(Clone, Debug, Default)]
pub struct Segment {
    /// Queries.
    pub q: Option<Tensor>,
    /// Keys.
    pub k: Option<Tensor>,
    /// Values.
    pub v: Option<Tensor>,
    /// The gradient of o.
    pub grad_o: Option<Tensor>,
}

/// Where segments come from.
pub trait SegmentSource: Send {
    /// Sequences.
    fn batch(&self) -> usize;

    /// Tokens of each sequence.
    fn tokens(&self) -> u64;

    /// A range of tokens. Ranges come in any order, and the same one may be asked for again.
    ///
    /// # Errors
    /// Whatever keeps the source from delivering; the stream stops there.
    fn read(&mut self, tokens: Range<u64>, wanted: Wanted) -> Result<Segment, StreamFailure>;
}

/// How far a stream is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamProgress {
    /// What is being done to all tokens: `"attend"`, `"absorb"`, `"read"`, or one of them backward.
    pub sweep: &'static str,
    /// Tokens of each sequence that are done in this sweep.
    pub done: u64,
    /// Tokens of each sequence.
    pub total: u64,
}

/// Called after each segment; [`ControlFlow::Break`] stops the stream with [`Error::Cancelled`].
pub type OnProgress<'a> = &'a mut (dyn FnMut(StreamProgress) -> ControlFlow<()> + 'a);

/// How a stream runs.
pub struct StreamOptions<'a> {
    /// Tokens of a segment. 65,536 by default.
    pub segment_tokens: usize,
    /// Element type of o; that of the inputs by default.
    pub output: Option<DType>,
    /// The first token to take of a forward stream: where an earlier one stopped.
    pub from: u64,
    /// Told of each segment.
    pub progress: Option<OnProgress<'a>>,
    /// Keeps states on the way, for a backward stream over the same tokens.
    pub boundaries: Option<&'a mut Boundaries>,
}

impl Default for StreamOptions<'_> {
    fn default() -> Self {
        Self { segment_tokens: 65536, output: None, from: 0, progress: None, boundaries: None }
    }
}

impl std::fmt::Debug for StreamOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { segment_tokens, output, from, .. } = self;
        write!(f, "StreamOptions {{ segment_tokens: {segment_tokens}, output: {output:?}, from: {from} }}")
    }
}

impl StreamOptions<'_> {
    /// Segments of `tokens`.
    pub(super) fn segments(&self, op: &'static str, tokens: Range<u64>) -> Result<Vec<Range<u64>>> {
        if self.segment_tokens == 0 || self.segment_tokens > 1 << 24 {
            return Err(Error::config("segment_tokens", self.segment_tokens, "must be 1 to 16777216"));
        }
        if tokens.start > tokens.end {
            return Err(Error::Limit { op, what: "first token", value: tokens.start, limit: tokens.end });
        }
        let step = self.segment_tokens as u64;
        let ends = |start: u64| start..start.saturating_add(step).min(tokens.end);
        Ok((tokens.start..tokens.end).step_by(self.segment_tokens).map(ends).collect())
    }

    pub(super) fn report(&mut self, op: &'static str, position: u64, progress: StreamProgress) -> Result<()> {
        let told = self.progress.as_mut().map(|told| told(progress));
        if told.is_some_and(|told| told.is_break()) { Err(Error::Cancelled { op, position }) } else { Ok(()) }
    }
}

/// States at segment boundaries, a limited number of them: where there would be more, every second is dropped, and the
/// backward stream finds the others again from those kept.
#[derive(Debug)]
pub struct Boundaries {
    most: usize,
    stride: usize,
    seen: usize,
    pub(super) kept: Vec<(u64, RaceState)>,
}

impl Boundaries {
    /// Keeps at most `most` states, at least 2.
    pub fn new(most: usize) -> Self {
        Self { most: most.max(2), stride: 1, seen: 0, kept: Vec::new() }
    }

    /// States kept.
    pub fn len(&self) -> usize {
        self.kept.len()
    }

    /// Whether none is kept.
    pub fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// Bytes that the states hold on their device.
    pub fn bytes(&self) -> u64 {
        self.kept.iter().map(|(_, state)| state.bytes()).sum()
    }

    /// The state at the begin of the next segment, kept if its turn has come.
    pub(super) fn offer(&mut self, position: u64, make: impl FnOnce() -> Result<RaceState>) -> Result<()> {
        if self.kept.last().is_some_and(|(last, _)| *last >= position) {
            return Ok(());
        }
        if self.seen.is_multiple_of(self.stride) {
            self.kept.push((position, make()?));
        }
        self.seen += 1;
        if self.kept.len() > self.most {
            let mut index = 0..;
            self.kept.retain(|_| index.next().is_some_and(|i: usize| i.is_multiple_of(2)));
            self.stride *= 2;
        }
        Ok(())
    }
}

/// Runs `body` over segments, the next one being read meanwhile. `body` returns errors as they are; those of the source
/// get the position.
#[cfg(not(target_arch = "wasm32"))]
pub(super) fn sweep(
    op: &'static str,
    source: &mut dyn SegmentSource,
    ranges: Vec<Range<u64>>,
    wanted: Wanted,
    position: impl Fn(&Range<u64>) -> u64 + Sync,
    mut body: impl FnMut(Range<u64>, Segment) -> Result<()>,
) -> Result<()> {
    std::thread::scope(|scope| {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        let reader = scope.spawn(move || {
            for range in ranges {
                let segment = source.read(range.clone(), wanted);
                let failed = segment.is_err();
                // A receiver that is gone has its reason; there is nobody left to read for.
                if sender.send((range, segment)).is_err() || failed {
                    break;
                }
            }
        });
        let mut at = 0;
        let mut result = Ok(());
        for (range, segment) in receiver {
            at = position(&range);
            result = segment.map_err(|cause| Error::Stream { op, position: at, cause }).and_then(|s| body(range, s));
            if result.is_err() {
                break;
            }
        }
        match reader.join() {
            Ok(()) => result,
            Err(_) => Err(Error::Stream { op, position: at, cause: "the source panicked".into() }),
        }
    })
}

/// As the other, without threads.
#[cfg(target_arch = "wasm32")]
pub(super) fn sweep(
    op: &'static str,
    source: &mut dyn SegmentSource,
    ranges: Vec<Range<u64>>,
    wanted: Wanted,
    position: impl Fn(&Range<u64>) -> u64 + Sync,
    mut body: impl FnMut(Range<u64>, Segment) -> Result<()>,
) -> Result<()> {
    ranges.into_iter().try_for_each(|range| {
        let at = position(&range);
        let segment = source.read(range.clone(), wanted);
        segment.map_err(|cause| Error::Stream { op, position: at, cause }).and_then(|segment| body(range, segment))
    })
}

/// A wanted tensor of a segment, of as many tokens as were asked for.
fn view<'a>(
    name: &'static str,
    tensor: &'a Option<Tensor>,
    wanted: bool,
    tokens: u64,
) -> Result<Option<TensorView<'a>>, StreamFailure> {
    if !wanted {
        return Ok(None);
    }
    let view = tensor.as_ref().and_then(Tensor::view).ok_or_else(|| format!("the source gave no {name}"))?;
    if view.shape()[1] as u64 != tokens {
        return Err(format!("the source gave {} tokens of {name}, asked for {tokens}", view.shape()[1]).into());
    }
    Ok(Some(view))
}

/// The inputs of a pass over a segment.
pub(super) fn inputs<'a>(
    segment: &'a Segment,
    range: &Range<u64>,
    wanted: Wanted,
) -> Result<Inputs<'a>, StreamFailure> {
    let tokens = range.end - range.start;
    Ok(Inputs {
        q: view("q", &segment.q, wanted.q, tokens)?,
        k: view("k", &segment.k, wanted.k, tokens)?,
        v: view("v", &segment.v, wanted.v, tokens)?,
        grad_o: view("grad_o", &segment.grad_o, wanted.grad_o, tokens)?,
    })
}

/// What a pass takes.
pub(super) fn wanted(pass: Pass, backward: bool) -> Wanted {
    Wanted { q: pass.reads(), k: pass.absorbs(), v: pass.absorbs(), grad_o: backward && pass.reads() }
}

/// Takes the outputs of a forward stream.
pub type OutputSink<'a> = &'a mut (dyn FnMut(Range<u64>, Tensor) -> Result<(), StreamFailure> + 'a);

impl Race {
    /// Attention over all tokens of `source` from [`StreamOptions::from`] on, after what `state` has seen; `state` takes
    /// them in. `sink` gets o of each segment, in order. Where the configuration is not causal, the source is read
    /// twice: [`Race::absorb_stream`], then [`Race::read_stream`].
    ///
    /// # Errors
    /// [`Error::Stream`] with the first token that was not delivered, whatever the cause; [`Error::Cancelled`] likewise.
    /// `state` stands at that token: the same call with `from` set to it goes on (where the configuration is not causal,
    /// the one of the two calls that the error names).
    pub fn forward_stream(
        &mut self,
        state: &mut RaceState,
        source: &mut dyn SegmentSource,
        sink: OutputSink<'_>,
        options: &mut StreamOptions<'_>,
    ) -> Result<()> {
        if self.config().causal {
            return self.forward_sweep("forward_stream", "attend", Pass::Causal, state, source, sink, options);
        }
        self.absorb_stream(state, source, options)?;
        options.from = 0;
        self.read_stream(state, source, sink, options)
    }

    /// `state` takes in the keys and values of all tokens of `source`; nothing is read from it.
    ///
    /// # Errors
    /// As [`Race::forward_stream`].
    pub fn absorb_stream(
        &mut self,
        state: &mut RaceState,
        source: &mut dyn SegmentSource,
        options: &mut StreamOptions<'_>,
    ) -> Result<()> {
        let mut nothing = |_, _| Ok(());
        self.forward_sweep("absorb_stream", "absorb", Pass::Absorb, state, source, &mut nothing, options)
    }

    /// All queries of `source` read from `state`, which stays.
    ///
    /// # Errors
    /// As [`Race::forward_stream`].
    pub fn read_stream(
        &mut self,
        state: &RaceState,
        source: &mut dyn SegmentSource,
        sink: OutputSink<'_>,
        options: &mut StreamOptions<'_>,
    ) -> Result<()> {
        let mut state = self.fork(state)?;
        self.forward_sweep("read_stream", "read", Pass::Read, &mut state, source, sink, options)
    }

    #[allow(clippy::too_many_arguments, reason = "one call's inputs, all different")]
    fn forward_sweep(
        &mut self,
        op: &'static str,
        sweep_name: &'static str,
        pass: Pass,
        state: &mut RaceState,
        source: &mut dyn SegmentSource,
        sink: OutputSink<'_>,
        options: &mut StreamOptions<'_>,
    ) -> Result<()> {
        let total = source.tokens();
        let ranges = options.segments(op, options.from..total)?;
        let wanted = wanted(pass, false);
        let race_options = RaceOptions { output: options.output, ..RaceOptions::default() };
        sweep(
            op,
            source,
            ranges,
            wanted,
            |range| range.start,
            |range, segment| {
                let position = range.start;
                let stopped = |cause: StreamFailure| Error::Stream { op, position, cause };
                let before = if pass.absorbs() { Some(self.fork(state)?) } else { None };
                let end = range.end;
                let delivered = (|| -> Result<(), StreamFailure> {
                    if let Some(boundaries) = &mut options.boundaries {
                        boundaries.offer(position, || self.fork(state))?;
                    }
                    let inputs = inputs(&segment, &range, wanted)?;
                    let o = self.pass(op, pass, Recording::Run, &inputs, state, &race_options)?;
                    self.device().settle(op)?;
                    o.map_or(Ok(()), |o| sink(range, o))
                })();
                if let Err(cause) = delivered {
                    if let Some(before) = before {
                        *state = before;
                    }
                    return Err(stopped(cause));
                }
                options.report(op, end, StreamProgress { sweep: sweep_name, done: end, total })
            },
        )
    }
}
