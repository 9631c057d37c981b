//! How a call is shared between threads.
//!
//! A unit is one kv head of one sequence. Where there are enough of them each is one task. Where one of them is most of
//! the call, units are cut into spans of tokens: what the spans add to the state (backward also: to its gradient) is
//! summed first, span by span, and added up; then every span has the state it starts with, and all run.

use crate::engine::cpu::map;
use crate::engine::cpu::memory::zeros;
use crate::error::Result;
use crate::race::cpu::backward::{Outputs, Sums};
use crate::race::cpu::plan::{Hashes, Plan};
use crate::race::cpu::tile::Rows;
use crate::race::cpu::worker::{Memory, Needs, Tensors, Wide, Worker};
use crate::race::cpu::{CpuParameterSums, CpuState};
use crate::race::executor::{Call, Pass};
use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};

/// Tokens of a span at least, where units are cut.
const SPAN: usize = 1024;
/// Chunks of a block of the causal backward, at least and at most, where their states take more than [`HELD`] bytes.
const BLOCK: std::ops::RangeInclusive<usize> = 32..=256;
/// Bytes that the states of a block's chunks may take in any case: a call of one block needs no first sweep.
const HELD: usize = 16 << 20;

/// Some tokens of one unit.
#[derive(Clone, Debug)]
struct Span {
    sequence: usize,
    kv_head: usize,
    tokens: Range<usize>,
    is_first: bool,
    is_last: bool,
}

impl Span {
    /// Index of its unit's state.
    fn unit(&self, plan: &Plan) -> usize {
        self.sequence * plan.kv_heads + self.kv_head
    }
}

/// Spans of all units, in order.
fn spans(plan: &Plan, call: &Call, threads: usize) -> Vec<Span> {
    let total = call.lengths.iter().fold(0usize, |sum, n| sum.saturating_add(*n)).saturating_mul(plan.kv_heads);
    let longest = call.lengths.iter().copied().max().unwrap_or(0);
    let fair = total.div_ceil(threads);
    // Cutting a causal pass costs about half as much again.
    let worth = if call.pass == Pass::Causal { fair.saturating_add(fair / 2) } else { fair };
    let span = if longest > worth.max(SPAN) { fair.max(SPAN).next_multiple_of(plan.chunk) } else { longest.max(1) };
    let mut out = Vec::new();
    for (sequence, &length) in call.lengths.iter().enumerate() {
        for kv_head in 0..plan.kv_heads {
            for first in (0..length).step_by(span) {
                let tokens = first..length.min(first + span);
                let (is_first, is_last) = (first == 0, tokens.end == length);
                out.push(Span { sequence, kv_head, tokens, is_first, is_last });
            }
        }
    }
    out
}

/// Scratch memory, taken before any work so that work cannot fail.
struct Pool {
    free: Mutex<Vec<Memory>>,
    returned: Condvar,
}

impl Pool {
    fn new(op: &'static str, plan: &Plan, needs: Needs, count: usize) -> Result<Self> {
        let free = (0..count).map(|_| Memory::new(op, plan, needs)).collect::<Result<Vec<_>>>()?;
        Ok(Self { free: Mutex::new(free), returned: Condvar::new() })
    }

    fn with<R>(&self, work: impl FnOnce(&mut Memory) -> R) -> R {
        let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
        let mut memory = loop {
            match free.pop() {
                Some(memory) => break memory,
                None => free = self.returned.wait(free).unwrap_or_else(PoisonError::into_inner),
            }
        };
        drop(free);
        let result = work(&mut memory);
        self.free.lock().unwrap_or_else(PoisonError::into_inner).push(memory);
        self.returned.notify_one();
        result
    }
}

/// A call: inputs, spans, and the memory to run them in.
pub(super) struct Job<'a> {
    plan: &'a Plan,
    hashes: &'a Hashes,
    tensors: Tensors<'a>,
    call: &'a Call,
    spans: Vec<Span>,
    needs: Needs,
    pool: Pool,
    /// States of spans, where units are cut.
    cut: Option<[CpuState; 2]>,
}

impl<'a> Job<'a> {
    pub fn new(
        plan: &'a Plan,
        hashes: &'a Hashes,
        tensors: Tensors<'a>,
        call: &'a Call,
        backward: bool,
    ) -> Result<Self> {
        let op = call.op;
        let threads = rayon::current_num_threads().max(1);
        let spans = spans(plan, call, threads);
        let mut needs = Needs { backward, ..Needs::default() };
        if backward && call.pass == Pass::Causal {
            let longest = spans.iter().map(|span| span.tokens.len()).max().unwrap_or(0);
            let chunks = longest.div_ceil(plan.chunk);
            let state = size_of::<f32>() * plan.masses().saturating_mul(plan.value_row + 1);
            let block = chunks.isqrt().clamp(*BLOCK.start(), *BLOCK.end());
            needs.block = block.max(HELD / state).min(chunks);
            needs.blocks = chunks.div_ceil(needs.block.max(1));
        }
        let pool = Pool::new(op, plan, needs, threads.min(spans.len()))?;
        let cut = if spans.iter().all(|span| span.is_first && span.is_last) {
            None
        } else {
            Some([CpuState::zeros(op, plan, spans.len())?, CpuState::zeros(op, plan, spans.len())?])
        };
        Ok(Self { plan, hashes, tensors, call, spans, needs, pool, cut })
    }

    /// Runs `work` on every span with what belongs to it, on all threads where that is worth it.
    fn each<T: Send>(&self, items: Vec<T>, work: impl Fn(&mut Worker<'_>, &Span, T) + Sync + Send) {
        let Self { plan, hashes, tensors, call, spans, needs, pool, .. } = self;
        let tokens = call.lengths.iter().map(|n| *n as u64).sum::<u64>();
        let per_token = ((plan.group + 1) * (plan.dim + plan.value_dim + plan.ensembles * plan.buckets)) as u64;
        let amount = tokens.saturating_mul(plan.kv_heads as u64).saturating_mul(per_token);
        let tasks: Vec<_> = spans.iter().zip(items).collect();
        map(tasks, amount, |(span, item)| {
            pool.with(|memory| {
                let hash = hashes.of_head(span.kv_head);
                let mut worker = Worker::new(plan, *needs, hash, *tensors, [span.sequence, span.kv_head], memory);
                work(&mut worker, span, item);
            });
        });
    }

    /// States of the spans' units, one for each; none may be cut.
    fn units<'s>(&self, state: &'s mut CpuState) -> Vec<Wide<'s>> {
        let mut wanted = self.spans.iter().map(|span| span.unit(self.plan)).peekable();
        let mut out = Vec::new();
        for (unit, wide) in state.units(self.plan).into_iter().enumerate() {
            if wanted.next_if_eq(&unit).is_some() {
                out.push(wide);
            }
        }
        out
    }

    /// Runs the forward pass; `state` moves on where the pass absorbs.
    pub fn forward(mut self, state: &mut CpuState, out: Option<&Rows<'_>>) {
        match (self.call.pass, self.cut.take()) {
            (Pass::Read, _) => {
                let state = &*state;
                let spans = vec![(); self.spans.len()];
                self.each(spans, |worker, span, ()| {
                    worker.narrow(state.unit(worker.plan, span.unit(worker.plan)));
                    worker.forward(&span.tokens, None, out);
                });
            }
            (_, None) => {
                let units = self.units(state);
                self.each(units, |worker, span, mut wide| {
                    worker.narrow((wide.a, wide.b));
                    worker.forward(&span.tokens, Some(wide.reborrow()), out);
                });
            }
            (pass, Some([mut starts, _])) => {
                self.sum(&mut starts, pass == Pass::Absorb);
                if pass == Pass::Causal {
                    self.scan(&mut starts, state);
                    self.each(starts.units(self.plan), |worker, span, mut wide| {
                        worker.narrow((wide.a, wide.b));
                        worker.forward(&span.tokens, Some(wide.reborrow()), out);
                    });
                    self.keep(&starts, state, |span| span.is_last);
                } else {
                    self.add(&starts, state);
                }
            }
        }
    }

    /// What each span adds to the state; of a unit's last span only where asked.
    fn sum(&self, sums: &mut CpuState, last_too: bool) {
        self.each(sums.units(self.plan), |worker, span, mut wide| {
            if last_too || !span.is_last {
                worker.forward(&span.tokens, Some(wide.reborrow()), None);
            }
        });
    }

    /// From what spans add to the state each begins with.
    fn scan(&self, sums: &mut CpuState, start: &CpuState) {
        self.accumulate(self.spans.iter().zip(sums.units(self.plan)), |span| span.is_first, start);
    }

    /// As [`Job::scan`] from the last span to the first.
    fn scan_back(&self, sums: &mut CpuState, end: &CpuState) {
        self.accumulate(self.spans.iter().zip(sums.units(self.plan)).rev(), |span| span.is_last, end);
    }

    /// Replaces what each span adds by the sum of all before it, which begins anew from its unit's `start`.
    fn accumulate<'s>(
        &self,
        spans: impl Iterator<Item = (&'s Span, Wide<'s>)>,
        begins: impl Fn(&Span) -> bool,
        start: &CpuState,
    ) {
        let mut running = CpuState { a: Vec::new(), b: Vec::new() };
        for (span, mut wide) in spans {
            if begins(span) {
                let (a, b) = start.unit(self.plan, span.unit(self.plan));
                running = CpuState { a: a.to_vec(), b: b.to_vec() };
            }
            for (running, wide) in [(&mut running.a, &mut wide.a), (&mut running.b, &mut wide.b)] {
                for (running, wide) in running.iter_mut().zip(wide.iter_mut()) {
                    let sum = *running + *wide;
                    *wide = std::mem::replace(running, sum);
                }
            }
        }
    }

    /// Copies the states of some spans to their units.
    fn keep(&self, from: &CpuState, to: &mut CpuState, wanted: impl Fn(&Span) -> bool) {
        let mut units = to.units(self.plan);
        for (i, span) in self.spans.iter().enumerate().filter(|(_, span)| wanted(span)) {
            units[span.unit(self.plan)].copy_from(from.unit(self.plan, i));
        }
    }

    /// Adds the states of all spans to their units.
    fn add(&self, from: &CpuState, to: &mut CpuState) {
        let mut units = to.units(self.plan);
        for (i, span) in self.spans.iter().enumerate() {
            units[span.unit(self.plan)].add(from.unit(self.plan, i));
        }
    }

    /// Runs the backward pass; `gradient` becomes that of the state before the tokens.
    pub fn backward(
        mut self,
        state: &CpuState,
        gradient: &mut CpuState,
        sums: &mut CpuParameterSums,
        out: Outputs<'_>,
    ) -> Result<()> {
        let plan = self.plan;
        let cut = self.cut.take();
        let weights = plan.weights();
        let op = self.call.op;
        let mut betas = zeros::<f64>(op, self.spans.len())?;
        let mut planes = zeros::<f64>(op, self.spans.len().saturating_mul(weights))?;
        let of_spans: Vec<Sums<'_>> = betas
            .iter_mut()
            .zip(planes.chunks_exact_mut(weights))
            .map(|(beta, planes)| Sums { beta, planes })
            .collect();
        let block = self.needs.block;
        match (self.call.pass, cut) {
            (Pass::Absorb, _) => {
                let gradient = &*gradient;
                self.each(of_spans, |worker, span, sums| {
                    let unit = span.unit(plan);
                    let (state, gradient) = (state.unit(plan, unit), gradient.unit(plan, unit));
                    worker.backward_absorb(&span.tokens, state, gradient, sums, out);
                });
            }
            (pass, None) => {
                let items: Vec<_> = self.units(gradient).into_iter().zip(of_spans).collect();
                self.each(items, |worker, span, (gradient, sums)| {
                    let state = state.unit(plan, span.unit(plan));
                    match pass {
                        Pass::Causal => worker.backward_causal(&span.tokens, block, state, gradient, sums, out),
                        _ => worker.backward_read(&span.tokens, state, gradient, sums, out),
                    }
                });
            }
            (Pass::Read, Some([mut sent, _])) => {
                let items: Vec<_> = sent.units(plan).into_iter().zip(of_spans).collect();
                self.each(items, |worker, span, (gradient, sums)| {
                    worker.backward_read(&span.tokens, state.unit(plan, span.unit(plan)), gradient, sums, out);
                });
                self.add(&sent, gradient);
            }
            (Pass::Causal, Some([mut starts, mut ends])) => {
                self.sum(&mut starts, false);
                self.scan(&mut starts, state);
                let mut moving = starts.copy(op)?;
                let items: Vec<_> = moving.units(plan).into_iter().zip(ends.units(plan)).collect();
                self.each(items, |worker, span, (state, gradient)| {
                    if !span.is_first {
                        worker.sent(&span.tokens, state, gradient);
                    }
                });
                self.scan_back(&mut ends, gradient);
                let starts = &starts;
                let each_start = (0..self.spans.len()).map(|i| starts.unit(plan, i));
                let items: Vec<_> = each_start.zip(ends.units(plan)).zip(of_spans).collect();
                self.each(items, |worker, span, ((state, gradient), sums)| {
                    worker.backward_causal(&span.tokens, block, state, gradient, sums, out);
                });
                self.keep(&ends, gradient, |span| span.is_first);
            }
        }
        // In order, so that the sums do not depend on who was first.
        for ((span, beta), planes) in self.spans.iter().zip(&betas).zip(planes.chunks_exact(weights)) {
            let (at, set) = (span.kv_head.min(self.hashes.betas() - 1), span.kv_head.min(self.hashes.sets - 1));
            sums.beta[at] += beta;
            sums.planes[set * weights..][..weights].iter_mut().zip(planes).for_each(|(x, y)| *x += y);
        }
        Ok(())
    }
}
