//! Backward streams: from the last segment to the first, from the states kept on the way there.

use crate::engine::Recording;
use crate::error::{Error, Result};
use crate::race::attention::{Race, RaceOptions};
use crate::race::executor::{InputGradients, Pass};
use crate::race::state::{RaceState, StateGradient};
use crate::race::stream::{
    Boundaries, Segment, SegmentSource, StreamFailure, StreamOptions, StreamProgress, inputs, sweep, wanted,
};
use crate::tensor::Tensor;
use std::ops::Range;

/// Boundary states that a backward stream keeps where no forward stream kept any.
const BOUNDARIES: usize = 512;

/// Gradients of one segment, f32; those that the sweep at hand gives.
#[derive(Debug)]
pub struct SegmentGradients {
    /// `[batch, token, num_q_heads, head_dim]`.
    pub dq: Option<Tensor>,
    /// `[batch, token, num_kv_heads, head_dim]`.
    pub dk: Option<Tensor>,
    /// `[batch, token, num_kv_heads, value_dim]`.
    pub dv: Option<Tensor>,
}

/// Takes the gradients of a backward stream: all three of each segment, the last segment first; where the
/// configuration is not causal, dq of every segment in order, then dk and dv of every segment.
pub type GradientSink<'a> = &'a mut (dyn FnMut(Range<u64>, SegmentGradients) -> Result<(), StreamFailure> + 'a);

/// A backward stream under way: it can be stopped and gone on with.
#[derive(Debug)]
pub struct BackwardStream {
    phase: Phase,
    /// Where the phase stands: tokens done from the front, or those left before it where it runs backwards.
    position: u64,
    tokens: u64,
    state: RaceState,
    boundaries: Boundaries,
    gradient: StateGradient,
    d_beta: Vec<f64>,
    d_planes: Vec<f64>,
    d_gate: Vec<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The state takes in all tokens: boundaries for the causal form, the total for the other.
    Absorb,
    /// Causal: segments from the last to the first.
    Causal,
    /// Not causal: dq, and the gradient of the total.
    Read,
    /// Not causal: dk and dv.
    Keys,
    Done,
}

/// What a backward stream sums up over all segments.
#[derive(Debug)]
pub struct StreamGradients {
    /// Of β: one value, or one per kv head.
    pub d_beta: Vec<f64>,
    /// Of the hyperplanes, `[sets, ensembles * tables * planes, head_dim]`.
    pub d_planes: Vec<f64>,
    /// Of the gates of an exact window: none without one, else one value, or one per query head.
    pub d_gate: Vec<f64>,
    /// Of the initial state.
    pub d_initial_state: StateGradient,
}

impl BackwardStream {
    /// The segments of at most `most` tokens before what is done whose states are kept, the last first, up to where one
    /// is missing.
    fn kept_segments(&self, most: u64) -> Vec<Range<u64>> {
        let mut end = self.position;
        let mut segments = Vec::new();
        for (start, _) in self.boundaries.kept.iter().rev().filter(|(at, _)| *at < self.position) {
            if end - start > most {
                break;
            }
            segments.push(*start..end);
            end = *start;
        }
        segments
    }

    /// Whether nothing is left to do.
    pub fn is_done(&self) -> bool {
        self.phase == Phase::Done
    }

    /// The sums.
    ///
    /// # Errors
    /// [`Error::Unsupported`] while there are segments left.
    pub fn finish(self) -> Result<StreamGradients> {
        if !self.is_done() {
            let why = format!("the stream stands at token {} of {}: go on with it", self.position, self.tokens);
            return Err(Error::Unsupported { op: "finish", why });
        }
        let Self { d_beta, d_planes, d_gate, gradient, .. } = self;
        Ok(StreamGradients { d_beta, d_planes, d_gate, d_initial_state: gradient })
    }
}

impl Race {
    /// Begins a backward stream over `tokens` tokens per sequence after `initial`, given the gradient of the final
    /// state. `boundaries` of a forward stream over the same tokens from token 0 on spare one sweep over the source.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::WrongDevice`] for states of another configuration or device,
    /// [`Error::OutOfMemory`].
    pub fn begin_backward_stream(
        &self,
        batch: usize,
        tokens: u64,
        initial: Option<&RaceState>,
        grad_final: Option<&StateGradient>,
        boundaries: Option<Boundaries>,
    ) -> Result<BackwardStream> {
        let op = "backward_stream";
        let state = self.start(op, batch, initial)?;
        let gradient = self.start_gradient(op, batch, grad_final)?;
        let kept = boundaries.filter(|b| self.config().causal && b.kept.first().is_some_and(|(at, _)| *at == 0));
        let (phase, position) = if kept.is_some() { (Phase::Causal, tokens) } else { (Phase::Absorb, 0) };
        Ok(BackwardStream {
            phase,
            position,
            tokens,
            state,
            boundaries: kept.unwrap_or_else(|| Boundaries::new(BOUNDARIES)),
            gradient,
            d_beta: vec![0.0; self.config().beta.values().len()],
            d_planes: vec![0.0; self.hyperplanes()?.len()],
            d_gate: if self.config().window > 0 { vec![0.0; self.config().gate.values().len()] } else { Vec::new() },
        })
    }

    /// Goes on with a backward stream until it is done. `source` must give the tokens that the forward pass saw, and the
    /// gradient of o.
    ///
    /// # Errors
    /// [`Error::Stream`] and [`Error::Cancelled`], with the position in the sweep under way; what was delivered stays
    /// delivered, and the same call goes on from there.
    pub fn backward_stream(
        &mut self,
        stream: &mut BackwardStream,
        source: &mut dyn SegmentSource,
        sink: GradientSink<'_>,
        options: &mut StreamOptions<'_>,
    ) -> Result<()> {
        let op = "backward_stream";
        if source.tokens() != stream.tokens {
            let expected = format!("{} tokens, as when the stream began", stream.tokens);
            return Err(Error::Shape { op, tensor: "source", got: vec![source.tokens() as usize], expected });
        }
        if stream.phase == Phase::Absorb {
            self.absorb_phase(stream, source, options)?;
        }
        match stream.phase {
            Phase::Causal => self.causal_phase(stream, source, sink, options),
            Phase::Read | Phase::Keys => self.split_phases(stream, source, sink, options),
            Phase::Absorb | Phase::Done => Ok(()),
        }
    }

    /// The forward part: boundaries, or the total.
    fn absorb_phase(
        &mut self,
        stream: &mut BackwardStream,
        source: &mut dyn SegmentSource,
        options: &mut StreamOptions<'_>,
    ) -> Result<()> {
        let causal = self.config().causal;
        // The last segment of a causal stream needs no state after it.
        let end = match options.segments("backward_stream", 0..stream.tokens)?.last() {
            Some(last) if causal => last.start,
            _ => stream.tokens,
        };
        let ranges = options.segments("backward_stream", stream.position..end.max(stream.position))?;
        self.absorb_segments(stream, source, ranges, options)?;
        if causal {
            let BackwardStream { boundaries, state, position, .. } = stream;
            boundaries.offer(*position, || self.fork(state))?;
        }
        (stream.phase, stream.position) = if causal { (Phase::Causal, stream.tokens) } else { (Phase::Read, 0) };
        Ok(())
    }

    fn absorb_segments(
        &mut self,
        stream: &mut BackwardStream,
        source: &mut dyn SegmentSource,
        ranges: Vec<Range<u64>>,
        options: &mut StreamOptions<'_>,
    ) -> Result<()> {
        let op = "backward_stream";
        let wanted = wanted(Pass::Absorb, false);
        let total = stream.tokens;
        sweep(
            op,
            source,
            ranges,
            wanted,
            |range| range.start,
            |range, segment| {
                let position = range.start;
                let kept = stream.boundaries.offer(position, || self.fork(&stream.state));
                kept.map_err(|error| Error::Stream { op, position, cause: error.into() })?;
                self.absorb_segment(&segment, &range, &mut stream.state, position)?;
                stream.position = range.end;
                options.report(op, range.end, StreamProgress { sweep: "absorb", done: range.end, total })
            },
        )
    }

    /// `state` takes in a segment; an error says `position`.
    fn absorb_segment(
        &mut self,
        segment: &Segment,
        range: &Range<u64>,
        state: &mut RaceState,
        position: u64,
    ) -> Result<()> {
        let op = "backward_stream";
        let absorbed = (|| -> Result<(), StreamFailure> {
            let inputs = inputs(segment, range, wanted(Pass::Absorb, false))?;
            self.pass(op, Pass::Absorb, Recording::Run, &inputs, state, &RaceOptions::default())?;
            Ok(self.device().settle(op)?)
        })();
        absorbed.map_err(|cause| Error::Stream { op, position, cause })
    }

    /// Segments from the last to the first: as long as the states before them are kept, one after the other; else block
    /// by block between kept states, those between being found again.
    fn causal_phase(
        &mut self,
        stream: &mut BackwardStream,
        source: &mut dyn SegmentSource,
        sink: GradientSink<'_>,
        options: &mut StreamOptions<'_>,
    ) -> Result<()> {
        let op = "backward_stream";
        let causal = wanted(Pass::Causal, true);
        while stream.position > 0 {
            // The kept state nearest before what is left.
            while stream.boundaries.kept.last().is_some_and(|(at, _)| *at >= stream.position) {
                stream.boundaries.kept.pop();
            }
            let mut descending = stream.kept_segments(options.segment_tokens as u64);
            let mut found = Vec::new();
            if descending.is_empty() {
                (descending, found) = self.block_states(stream, source, options)?;
            }
            sweep(
                op,
                source,
                descending,
                causal,
                |range| range.end,
                |range, segment| {
                    let kept = &mut stream.boundaries.kept;
                    let (is_kept, state) = match found.pop() {
                        Some(state) => (false, state),
                        None => match kept.pop_if(|(at, _)| *at == range.start) {
                            Some((_, state)) => (true, state),
                            None => return Err(Error::Unsupported { op, why: "a segment without its state".into() }),
                        },
                    };
                    let inputs = inputs(&segment, &range, causal);
                    let inputs = inputs.map_err(|cause| Error::Stream { op, position: range.end, cause });
                    let done = inputs.and_then(|inputs| {
                        self.segment_backward(stream, Pass::Causal, &inputs, &state, range.clone(), range.end, sink)
                    });
                    if let Err(error) = done {
                        if is_kept {
                            stream.boundaries.kept.push((range.start, state));
                        }
                        return Err(error);
                    }
                    stream.position = range.start;
                    let done = stream.tokens - range.start;
                    let progress = StreamProgress { sweep: "attend, backward", done, total: stream.tokens };
                    options.report(op, range.start, progress)
                },
            )?;
        }
        stream.phase = Phase::Done;
        Ok(())
    }

    /// The segments from the kept state nearest before what is left to there, the last first, and the states before
    /// them, in order.
    fn block_states(
        &mut self,
        stream: &BackwardStream,
        source: &mut dyn SegmentSource,
        options: &StreamOptions<'_>,
    ) -> Result<(Vec<Range<u64>>, Vec<RaceState>)> {
        let (op, position) = ("backward_stream", stream.position);
        let Some((start, state)) = stream.boundaries.kept.last() else {
            let cause = "no boundary state is left: the stream began with boundaries of other tokens".into();
            return Err(Error::Stream { op, position, cause });
        };
        let mut state = self.fork(state)?;
        let mut ranges = options.segments(op, *start..position)?;
        let mut states = Vec::with_capacity(ranges.len());
        if let Some((_, before_last)) = ranges.split_last() {
            sweep(
                op,
                source,
                before_last.to_vec(),
                wanted(Pass::Absorb, false),
                |_| position,
                |range, segment| {
                    states.push(self.fork(&state)?);
                    self.absorb_segment(&segment, &range, &mut state, position)
                },
            )?;
        }
        states.push(state);
        ranges.reverse();
        Ok((ranges, states))
    }

    /// Not causal: dq of all segments, then dk and dv of all segments.
    fn split_phases(
        &mut self,
        stream: &mut BackwardStream,
        source: &mut dyn SegmentSource,
        sink: GradientSink<'_>,
        options: &mut StreamOptions<'_>,
    ) -> Result<()> {
        let op = "backward_stream";
        loop {
            let (pass, name, next) = match stream.phase {
                Phase::Read => (Pass::Read, "read, backward", Phase::Keys),
                Phase::Keys => (Pass::Absorb, "absorb, backward", Phase::Done),
                _ => return Ok(()),
            };
            let wanted = wanted(pass, true);
            let ranges = options.segments(op, stream.position..stream.tokens)?;
            let total_state = self.fork(&stream.state)?;
            sweep(
                op,
                source,
                ranges,
                wanted,
                |range| range.start,
                |range, segment| {
                    let inputs = inputs(&segment, &range, wanted).map_err(|cause| Error::Stream {
                        op,
                        position: range.start,
                        cause,
                    })?;
                    self.segment_backward(stream, pass, &inputs, &total_state, range.clone(), range.start, sink)?;
                    stream.position = range.end;
                    let progress = StreamProgress { sweep: name, done: range.end, total: stream.tokens };
                    options.report(op, range.end, progress)
                },
            )?;
            (stream.phase, stream.position) = (next, 0);
        }
    }

    /// One segment's gradients to the sink; nothing has happened where that fails.
    #[allow(clippy::too_many_arguments, reason = "one call's inputs, all different")]
    fn segment_backward(
        &mut self,
        stream: &mut BackwardStream,
        pass: Pass,
        inputs: &crate::race::executor::Inputs<'_>,
        state: &RaceState,
        range: Range<u64>,
        position: u64,
        sink: GradientSink<'_>,
    ) -> Result<()> {
        let op = "backward_stream";
        let mut gradient = self.start_gradient(op, stream.gradient.batch(), Some(&stream.gradient))?;
        let made = (|| -> Result<[Option<Tensor>; 3], StreamFailure> {
            let mut sums = self.executor().new_sums(op)?;
            let none = RaceOptions::default();
            let (made, gate) = self.pass_backward(op, pass, inputs, state, &mut gradient, &mut sums, &none)?;
            let InputGradients { dq, dk, dv } = made;
            let (beta, planes) = self.executor().finish_sums(op, sums)?;
            self.device().settle(op)?;
            sink(range, SegmentGradients { dq, dk, dv })?;
            Ok([Some(beta), Some(planes), gate])
        })();
        let added = made.and_then(|sums| {
            let read = |x: Option<Tensor>| x.map_or(Ok(Vec::new()), |x| Ok(x.read_blocking()?.to_f32()));
            let sums = sums.into_iter().map(read).collect::<Result<Vec<_>>>()?;
            let totals = [&mut stream.d_beta, &mut stream.d_planes, &mut stream.d_gate];
            for (total, sum) in totals.into_iter().zip(sums) {
                total.iter_mut().zip(sum).for_each(|(total, x)| *total += f64::from(x));
            }
            Ok(())
        });
        added.map_err(|cause| Error::Stream { op, position, cause })?;
        stream.gradient = gradient;
        Ok(())
    }
}
