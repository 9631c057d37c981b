//! A layer of RACE to be timed.

use super::counter::{Counter, Part};
use super::counter_gpu::Generator;
use super::outcome::{Outcome, Wrong};
use super::race_truth::{self, At, Truth};
use super::race_window::Window;
use super::resident::{elements, repeated};
use softhash::{
    DType, Device, Gate, Race, RaceConfig, RaceOptions, RaceShape, Segment, SegmentSource, StreamFailure,
    StreamOptions, Tensor, TensorView, Wanted,
};
use std::collections::HashMap;
use std::ops::Range;

#[derive(Clone, Copy)]
pub struct Size {
    pub tokens: u64,
    pub segment: u64,
    pub heads: usize,
    pub channels: usize,
    pub dtype: DType,
}

impl Size {
    /// Tokens of a call.
    fn call(&self) -> u64 {
        self.tokens.min(self.segment)
    }

    fn calls(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let Self { tokens, segment, .. } = *self;
        (0..tokens).step_by(segment as usize).map(move |start| start..tokens.min(start + segment))
    }
}

/// Tokens after which all repeats: what is true of a long sequence is known after one period.
const PERIOD: u64 = 1 << 16;

/// The resident tensors of one call; q, k, v and the gradient of o.
pub struct Tensors {
    pub size: Size,
    pub counter: Counter,
    all: [Tensor; 4],
}

impl Tensors {
    pub fn new(device: &Device, size: Size) -> Outcome<Self> {
        let Size { heads, channels, dtype, .. } = size;
        let whole = size.tokens <= size.segment || size.tokens.is_multiple_of(size.segment);
        let call = size.call();
        let period = if call.is_multiple_of(PERIOD) { PERIOD } else { call };
        if !whole {
            return Err(format!("{} tokens are not whole segments of {}", size.tokens, size.segment).into());
        }
        let counter = Counter { seed: 1, heads, channels, dtype, period };
        let mut generator = Generator::new(device, counter);
        let mut make = |part| match &mut generator {
            Some(generator) => Ok(generator.tensor(part, 0..call)?),
            None => repeated(device, counter.tensor(part, 0..period)?, (call / period) as usize),
        };
        let all = [make(Part::Q)?, make(Part::K)?, make(Part::V)?, make(Part::GradO)?];
        Ok(Self { size, counter, all })
    }

    pub fn views(&self) -> [TensorView<'_>; 4] {
        self.all.each_ref().map(|tensor| tensor.view().unwrap())
    }
}

/// Hands out the resident tensors for every segment.
struct Again<'a>(&'a Tensors);

impl SegmentSource for Again<'_> {
    fn batch(&self) -> usize {
        1
    }

    fn tokens(&self) -> u64 {
        self.0.size.tokens
    }

    fn read(&mut self, _: Range<u64>, wanted: Wanted) -> Result<Segment, StreamFailure> {
        let [q, k, v, grad_o] = &self.0.all;
        let give = |tensor: &Tensor, wanted: bool| wanted.then(|| tensor.clone());
        Ok(Segment {
            q: give(q, wanted.q),
            k: give(k, wanted.k),
            v: give(v, wanted.v),
            grad_o: give(grad_o, wanted.grad_o),
        })
    }
}

/// What is true at some tokens, kept for the next device that is asked the same.
#[derive(Default)]
pub struct Truths(HashMap<Question, Vec<At>>);

#[derive(PartialEq, Eq, Hash)]
struct Question {
    tokens: u64,
    period: u64,
    dtype: DType,
    hash: (usize, usize),
    wanted: Vec<u64>,
    backward: bool,
}

pub struct Layer<'a> {
    race: Race,
    tensors: &'a Tensors,
    name: String,
    hash: (usize, usize),
    /// Of one call; a stream's are f32.
    gradients: DType,
}

/// The head that is looked at.
pub const HEAD: usize = 0;

/// Tokens before the last among which results are looked at: more than a segment, fewer than 12 million.
const REACH: u64 = 1 << 19;

/// How far the output is mixed with that of the window beside it.
const GATE: f64 = 0.5;

/// RACE of those heads, channels and elements, with its kernels compiled; `window` tokens of exact attention beside it, 0
/// for none.
pub fn race(
    device: &Device,
    (heads, channels, dtype): (usize, usize, DType),
    (planes, tables): (usize, usize),
    window: usize,
) -> Outcome<Race> {
    let shape = RaceShape { num_q_heads: heads, num_kv_heads: heads, head_dim: channels, value_dim: channels, dtype };
    let config = RaceConfig { planes, tables, window, gate: Gate::Shared(GATE as f32), ..RaceConfig::default() };
    let race = Race::new(device, config, shape)?;
    race.warm_up(dtype)?;
    Ok(race)
}

/// What the judge knows of the window of `race`; `None` where there is none.
pub fn window(race: &Race) -> Option<Window> {
    let tokens = race.config().window as u64;
    (tokens > 0).then_some(Window { tokens, gate: GATE })
}

/// P and L, and the window's tokens where there is one.
pub fn name((planes, tables): (usize, usize), window: usize) -> String {
    let of_window = if window > 0 { format!(" W{window}") } else { String::new() };
    format!("RACE P{planes} L{tables}{of_window}")
}

impl<'a> Layer<'a> {
    pub fn new(device: &Device, tensors: &'a Tensors, hash: (usize, usize), window: usize) -> Outcome<Self> {
        let Size { heads, channels, dtype, .. } = tensors.size;
        let race = race(device, (heads, channels, dtype), hash, window)?;
        Ok(Self { race, tensors, name: name(hash, window), hash, gradients: DType::F32 })
    }

    /// Gradients of q, k and v in `dtype` where one call gives them all.
    pub fn gradients(self, dtype: DType) -> Self {
        let Size { tokens, segment, .. } = self.tensors.size;
        let gradients = if tokens <= segment { dtype } else { DType::F32 };
        let name = if gradients == DType::F32 { self.name } else { format!("{} {gradients:?} gradients", self.name) };
        Self { gradients, name, ..self }
    }

    pub fn size(&self) -> Size {
        self.tensors.size
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Bytes that a pass over all tokens moves at least.
    pub fn bytes(&self, backward: bool) -> u64 {
        self.race.least_bytes(self.tensors.size.tokens, backward.then_some(self.gradients))
    }

    pub fn forward(&mut self, mut sink: impl FnMut(Range<u64>, &Tensor) -> Outcome<()>) -> Outcome<()> {
        let mut state = self.race.new_state(1)?;
        for range in self.tensors.size.calls() {
            let [q, k, v, _] = self.tensors.views();
            let o = self.race.append(&mut state, &q, &k, &v)?;
            sink(range, &o)?;
        }
        Ok(())
    }

    pub fn backward(&mut self, mut sink: impl FnMut(Range<u64>, [&Tensor; 3]) -> Outcome<()>) -> Outcome<()> {
        let Size { tokens, segment, .. } = self.tensors.size;
        if tokens <= segment {
            let [q, k, v, grad_o] = self.tensors.views();
            let options = RaceOptions { gradients: Some(self.gradients), ..RaceOptions::default() };
            let got = self.race.backward(&q, &k, &v, &grad_o, None, None, &options)?;
            return sink(0..tokens, [&got.dq, &got.dk, &got.dv]);
        }
        let mut stream = self.race.begin_backward_stream(1, tokens, None, None, None)?;
        let mut options = StreamOptions { segment_tokens: segment as usize, ..StreamOptions::default() };
        let mut deliver = |range, got: softhash::SegmentGradients| -> Result<(), StreamFailure> {
            let (Some(dq), Some(dk), Some(dv)) = (&got.dq, &got.dk, &got.dv) else { return Err("no gradient".into()) };
            sink(range, [dq, dk, dv]).map_err(|error| error.to_string().into())
        };
        self.race.backward_stream(&mut stream, &mut Again(self.tensors), &mut deliver, &mut options)?;
        Ok(())
    }

    fn truths(&self, truths: &mut Truths, wanted: &[u64], backward: bool) -> Outcome<Vec<At>> {
        let Size { tokens, dtype, .. } = self.tensors.size;
        let (counter, planes_per_table) = (self.tensors.counter, self.hash.0);
        let planes = self.race.hyperplanes()?.into_iter().map(f64::from).collect();
        let truth = Truth { counter, head: HEAD, planes, planes_per_table, beta: 1.0 };
        let (period, hash, wanted) = (counter.period, self.hash, wanted.to_vec());
        let question = Question { tokens, period, dtype, hash, wanted, backward };
        let wanted = question.wanted.clone();
        let answer = truths.0.entry(question).or_insert_with(|| truth.at(tokens, &wanted, backward, |_| ()));
        Ok(answer.clone())
    }

    /// Compares one head at some tokens with sums in f64 over all of them.
    pub fn check(&mut self, truths: &mut Truths, backward: bool) -> Outcome<()> {
        let Size { tokens, channels, heads, dtype, .. } = self.tensors.size;
        let reach = tokens.min(REACH);
        let mut wanted = vec![tokens - reach + reach / 3, tokens - reach + reach * 2 / 3, tokens - 1];
        wanted.dedup();
        let mut truths = self.truths(truths, &wanted, backward)?;
        if let Some(window) = window(&self.race) {
            truths.iter_mut().for_each(|at| window.mix(&self.tensors.counter, HEAD, tokens, backward, at));
        }
        let mut found: Vec<At> = wanted.iter().map(|&token| At { token, ..At::default() }).collect();
        let device = self.race.device().clone();
        let row = |range: &Range<u64>, token: u64, tensor: &Tensor| -> Outcome<Vec<f64>> {
            let at = ((token - range.start) as usize * heads + HEAD) * channels;
            Ok(elements(&device, tensor, at..at + channels)?.into_iter().map(f64::from).collect())
        };
        self.forward(|range, o| {
            for at in found.iter_mut().filter(|at| range.contains(&at.token)) {
                at.o = row(&range, at.token, o)?;
            }
            Ok(())
        })?;
        if backward {
            self.backward(|range, [dq, dk, dv]| {
                for at in found.iter_mut().filter(|at| range.contains(&at.token)) {
                    at.dq = row(&range, at.token, dq)?;
                    at.dk = row(&range, at.token, dk)?;
                    at.dv = row(&range, at.token, dv)?;
                }
                Ok(())
            })?;
        }
        for (found, truth) in found.iter().zip(&truths) {
            let pairs = found.parts().into_iter().zip(truth.parts()).zip(["o", "dq", "dk", "dv"]);
            for ((one, truth), name) in pairs.take(if backward { 4 } else { 1 }) {
                let (error, token) = (race_truth::error(one, truth), found.token);
                if error >= race_truth::tolerance(dtype) {
                    return Err(Wrong(format!("{}: {name} of token {token} is off by {error:.1e}", self.name)).into());
                }
            }
        }
        Ok(())
    }
}
