//! A layer of RACE to be timed, and the exact attention beside it.

use super::Clock;
use super::counter::{Counter, Part};
use super::counter_gpu::Generator;
use super::race_record::{Record, Run};
use super::race_truth::{self, At, Truth};
use softhash::{
    CacheShape, DType, Device, Race, RaceConfig, RaceOptions, RaceShape, Segment, SegmentSource, SocketCache,
    SocketConfig, StreamFailure, StreamOptions, Tensor, TensorView, Wanted,
};
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

    /// Bytes of one tensor over all tokens.
    fn bytes(&self, dtype: DType) -> u64 {
        self.tokens * (self.heads * self.channels * dtype.size()) as u64
    }

    fn calls(&self) -> impl Iterator<Item = Range<u64>> + use<> {
        let Self { tokens, segment, .. } = *self;
        (0..tokens).step_by(segment as usize).map(move |start| start..tokens.min(start + segment))
    }
}

#[cfg(feature = "cuda")]
/// The tensor in the device's memory, where the device is CUDA.
fn resident(device: &Device, tensor: Tensor) -> Tensor {
    let Some((_, stream)) = device.as_cuda() else { return tensor };
    let host = tensor.read_blocking().unwrap();
    let slice = stream.clone_htod(host.bytes()).unwrap();
    let shape = tensor.shape().try_into().unwrap();
    Tensor::from_cuda_slice(device, slice, tensor.dtype(), shape).unwrap()
}

/// The resident tensors of one call; q, k, v and the gradient of o.
pub struct Tensors {
    size: Size,
    counter: Counter,
    all: [Tensor; 4],
}

impl Tensors {
    pub fn new(device: &Device, size: Size) -> Self {
        let Size { heads, channels, dtype, .. } = size;
        let whole = size.tokens <= size.segment || size.tokens.is_multiple_of(size.segment);
        assert!(whole, "{} tokens are not whole segments of {}", size.tokens, size.segment);
        let counter = Counter { seed: 1, heads, channels, dtype, period: size.call() };
        let mut generator = Generator::new(device, counter);
        let all = [Part::Q, Part::K, Part::V, Part::GradO].map(|part| match &mut generator {
            Some(generator) => generator.tensor(part, 0..size.call()).unwrap(),
            #[cfg(feature = "cuda")]
            None => resident(device, counter.tensor(part, 0..size.call()).unwrap()),
            #[cfg(not(feature = "cuda"))]
            None => counter.tensor(part, 0..size.call()).unwrap(),
        });
        if let Some(generator) = generator {
            eprintln!("{} tokens: {} MiB of tensors on the device", size.tokens, generator.bytes() >> 20);
        }
        Self { size, counter, all }
    }

    fn views(&self) -> [TensorView<'_>; 4] {
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

pub struct Layer<'a> {
    race: Race,
    tensors: &'a Tensors,
    name: String,
    planes: usize,
}

const HEAD: usize = 0;

impl<'a> Layer<'a> {
    pub fn new(device: &Device, tensors: &'a Tensors, (planes, tables): (usize, usize)) -> Self {
        let Size { heads, channels, dtype, .. } = tensors.size;
        let shape =
            RaceShape { num_q_heads: heads, num_kv_heads: heads, head_dim: channels, value_dim: channels, dtype };
        let race = Race::new(device, RaceConfig { planes, tables, ..RaceConfig::default() }, shape).unwrap();
        race.warm_up(dtype).unwrap();
        Self { race, tensors, name: format!("RACE P{planes} L{tables}"), planes }
    }

    fn run_forward(&mut self, mut sink: impl FnMut(Range<u64>, &Tensor)) {
        let mut state = self.race.new_state(1).unwrap();
        for range in self.tensors.size.calls() {
            let [q, k, v, _] = self.tensors.views();
            let o = self.race.append(&mut state, &q, &k, &v).unwrap();
            sink(range, &o);
        }
    }

    fn run_backward(&mut self, mut sink: impl FnMut(Range<u64>, [&Tensor; 3])) {
        let Size { tokens, segment, .. } = self.tensors.size;
        if tokens <= segment {
            let [q, k, v, grad_o] = self.tensors.views();
            let got = self.race.backward(&q, &k, &v, &grad_o, None, None, &RaceOptions::default()).unwrap();
            return sink(0..tokens, [&got.dq, &got.dk, &got.dv]);
        }
        let mut stream = self.race.begin_backward_stream(1, tokens, None, None, None).unwrap();
        let mut options = StreamOptions { segment_tokens: segment as usize, ..StreamOptions::default() };
        let mut deliver = |range, got: softhash::SegmentGradients| {
            let [dq, dk, dv] = [got.dq.unwrap(), got.dk.unwrap(), got.dv.unwrap()];
            sink(range, [&dq, &dk, &dv]);
            Ok(())
        };
        self.race.backward_stream(&mut stream, &mut Again(self.tensors), &mut deliver, &mut options).unwrap();
    }

    /// One pass, for its side effects on clocks.
    pub fn once(&mut self, backward: bool) {
        if backward {
            self.run_backward(|_, _| ());
        } else {
            self.run_forward(|_, _| ());
        }
    }

    /// Compares one head at some tokens with sums in f64 over all of them.
    pub fn check(&mut self, backward: bool) {
        let Size { tokens, dtype, .. } = self.tensors.size;
        let mut wanted = vec![tokens / 3, tokens * 2 / 3, tokens - 1];
        wanted.dedup();
        let truth = Truth {
            counter: self.tensors.counter,
            head: HEAD,
            planes: self.race.hyperplanes().unwrap().into_iter().map(f64::from).collect(),
            planes_per_table: self.planes,
            beta: 1.0,
        };
        let truths = truth.at(tokens, &wanted, backward, |_| ());
        let mut found: Vec<At> = wanted.iter().map(|&token| At { token, ..At::default() }).collect();
        self.run_forward(|range, o| race_truth::note(&mut found, HEAD, &range, o, |at| &mut at.o).unwrap());
        if backward {
            self.run_backward(|range, [dq, dk, dv]| {
                race_truth::note(&mut found, HEAD, &range, dq, |at| &mut at.dq).unwrap();
                race_truth::note(&mut found, HEAD, &range, dk, |at| &mut at.dk).unwrap();
                race_truth::note(&mut found, HEAD, &range, dv, |at| &mut at.dv).unwrap();
            });
        }
        for (found, truth) in found.iter().zip(&truths) {
            let pairs = found.parts().into_iter().zip(truth.parts()).zip(["o", "dq", "dk", "dv"]);
            for ((one, truth), name) in pairs.take(if backward { 4 } else { 1 }) {
                let (error, token) = (race_truth::error(one, truth), found.token);
                let right = error < race_truth::tolerance(dtype);
                assert!(right, "{}: {name} of token {token} is off by {error:.1e}: no times are taken", self.name);
            }
        }
    }

    pub fn forward(&mut self, clock: &Clock, run: &mut Run) -> f64 {
        let size = self.tensors.size;
        let record = Record::new(&self.name, "forward", &size, 4 * size.bytes(size.dtype));
        clock.measure(run, record, || self.run_forward(|_, _| ()))
    }

    pub fn backward(&mut self, clock: &Clock, run: &mut Run) -> f64 {
        let size = self.tensors.size;
        let bytes = 4 * size.bytes(size.dtype) + 3 * size.bytes(DType::F32);
        let record = Record::new(&self.name, "backward", &size, bytes);
        clock.measure(run, record, || self.run_backward(|_, _| ()))
    }

    /// One token after any number: the state is all that is read of them.
    pub fn step(&mut self, clock: &Clock, run: &mut Run) -> f64 {
        self.check(false);
        let size = self.tensors.size;
        let mut state = self.race.new_state(1).unwrap();
        let record = Record::new(&self.name, "step", &size, 2 * state.bytes() + 4 * size.bytes(size.dtype));
        let [q, k, v, _] = self.tensors.views();
        clock.measure(run, record, || {
            self.race.append(&mut state, &q, &k, &v).unwrap();
        })
    }
}

/// Seconds of exact causal attention over the same tensors, the keys being in the cache already.
pub fn dense(device: &Device, tensors: &Tensors, clock: &Clock, run: &mut Run) -> f64 {
    let Size { heads, channels, dtype, .. } = tensors.size;
    let shape = CacheShape { num_q_heads: heads, num_kv_heads: heads, head_dim: channels, value_dim: channels, dtype };
    let mut cache = SocketCache::new(device, SocketConfig::fast(), shape, 1).unwrap();
    let [q, k, v, _] = tensors.views();
    cache.append(&k, &v).unwrap();
    check_dense(tensors, &cache.prefill(&q).unwrap().o);
    let record = Record::new("dense", "forward", &tensors.size, 0);
    clock.measure(run, record, || {
        cache.prefill(&q).unwrap();
    })
}

/// Compares the last token of one head with a softmax in f64.
fn check_dense(tensors: &Tensors, o: &Tensor) {
    let Size { tokens, channels, dtype, .. } = tensors.size;
    let row = |part, token| {
        let mut row = vec![0.0; channels];
        tensors.counter.row(part, token, HEAD, &mut row);
        row
    };
    let q = row(Part::Q, tokens - 1);
    let (mut sum, mut truth) = (0.0, vec![0.0; channels]);
    for token in 0..tokens {
        let logit: f64 = row(Part::K, token).iter().zip(&q).map(|(k, q)| k * q).sum();
        let weight = (logit / (channels as f64).sqrt()).exp();
        sum += weight;
        truth.iter_mut().zip(row(Part::V, token)).for_each(|(t, v)| *t += weight * v);
    }
    truth.iter_mut().for_each(|t| *t /= sum);
    let mut found = [At { token: tokens - 1, ..At::default() }];
    race_truth::note(&mut found, HEAD, &(0..tokens), o, |at| &mut at.o).unwrap();
    let error = race_truth::error(&found[0].o, &truth);
    assert!(
        error < race_truth::tolerance(dtype),
        "dense over {tokens} tokens is off by {error:.1e}: no times are taken"
    );
}
