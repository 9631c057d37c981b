//! Streams of RACE attention: any cut equals the whole, and whatever stops one, it goes on where it stopped.
#![cfg(not(target_arch = "wasm32"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    pub mod device;
}

use softhash::{
    BackwardStream, Beta, Boundaries, DType, Device, Error, Gate, HostSource, Hyperplanes, Normalization, Race,
    RaceConfig, RaceOptions, RaceShape, RaceState, ResidentSource, Segment, SegmentSource, StreamFailure,
    StreamOptions, TensorView, Wanted,
};
use std::collections::BTreeMap;
use std::ops::{ControlFlow, Range};

const SHAPE: RaceShape = RaceShape { num_q_heads: 4, num_kv_heads: 2, head_dim: 16, value_dim: 12, dtype: DType::F32 };
const BATCH: usize = 2;

fn config(causal: bool) -> RaceConfig {
    RaceConfig {
        tables: 2,
        planes: 2,
        ensembles: 2,
        beta: Beta::PerHead(vec![0.7, 1.4]),
        normalization: if causal { Normalization::BucketMean } else { Normalization::Ratio },
        causal,
        hyperplanes: Hyperplanes::Gaussian { seed: 3 },
        ..RaceConfig::default()
    }
}

/// With the exact window, whose ring is longer than most segments.
fn windowed() -> RaceConfig {
    RaceConfig { window: 20, gate: Gate::PerHead(vec![0.2, 0.5, 0.7, 1.0]), ..config(true) }
}

fn configs() -> [RaceConfig; 3] {
    [config(true), config(false), windowed()]
}

fn numbers(seed: u32, n: usize) -> Vec<f32> {
    let mut x = seed.wrapping_mul(2_654_435_761).max(1);
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 17;
        x ^= x << 5;
        x as f32 / u32::MAX as f32 - 0.5
    };
    (0..n).map(|_| 3.0 * next()).collect()
}

/// q, k, v and the gradient of o.
struct Data {
    tokens: usize,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    grad_o: Vec<f32>,
}

impl Data {
    fn new(tokens: usize) -> Self {
        let n = |heads, dim| BATCH * tokens * heads * dim;
        let s = SHAPE;
        Self {
            tokens,
            q: numbers(1, n(s.num_q_heads, s.head_dim)),
            k: numbers(2, n(s.num_kv_heads, s.head_dim)),
            v: numbers(3, n(s.num_kv_heads, s.value_dim)),
            grad_o: numbers(4, n(s.num_q_heads, s.value_dim)),
        }
    }

    fn views(&self) -> [TensorView<'_>; 4] {
        let s = SHAPE;
        let view = |x, heads, dim| TensorView::f32(x, [BATCH, self.tokens, heads, dim]);
        [
            view(&self.q, s.num_q_heads, s.head_dim),
            view(&self.k, s.num_kv_heads, s.head_dim),
            view(&self.v, s.num_kv_heads, s.value_dim),
            view(&self.grad_o, s.num_q_heads, s.value_dim),
        ]
    }

    fn source(&self) -> HostSource<'_> {
        let [q, k, v, g] = self.views();
        HostSource::new(q, k, v, Some(g)).unwrap()
    }
}

/// Rows of segments, by their first token; put together they are the whole.
#[derive(Default)]
struct Rows(BTreeMap<u64, (Range<u64>, Vec<f32>)>);

impl Rows {
    fn take(&mut self, range: Range<u64>, data: Vec<f32>) {
        let old = self.0.insert(range.start, (range, data));
        assert!(old.is_none(), "a segment was delivered twice");
    }

    /// `[batch, token, row]`.
    fn whole(&self, tokens: usize, row: usize) -> Vec<f32> {
        let mut out = vec![f32::NAN; BATCH * tokens * row];
        for (range, data) in self.0.values() {
            let count = (range.end - range.start) as usize * row;
            for b in 0..BATCH {
                let at = (b * tokens + range.start as usize) * row;
                out[at..at + count].copy_from_slice(&data[b * count..(b + 1) * count]);
            }
        }
        out
    }
}

#[track_caller]
fn close(what: &str, got: &[f32], want: &[f32], bound: f64) {
    assert_eq!(got.len(), want.len(), "{what}");
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
    let difference = norm(&mut got.iter().zip(want).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    let error = difference / norm(&mut want.iter().map(|x| f64::from(*x))).max(1e-30);
    assert!(error <= bound, "{what}: {error:.2e} above {bound:.0e}");
}

#[track_caller]
fn same_state(race: &Race, got: &RaceState, want: &RaceState) {
    let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
    let (got_parts, want_parts) = (race.read_state(got).unwrap(), race.read_state(want).unwrap());
    close("A", &narrow(&got_parts.a), &narrow(&want_parts.a), 1e-6);
    close("B", &narrow(&got_parts.b), &narrow(&want_parts.b), 1e-6);
    assert_eq!((got_parts.window_k, got_parts.window_v), (want_parts.window_k, want_parts.window_v));
    assert_eq!(got.tokens(1), want.tokens(1));
}

fn options<'a>(segment_tokens: usize) -> StreamOptions<'a> {
    StreamOptions { segment_tokens, ..StreamOptions::default() }
}

fn forward_streams_equal_the_whole(device: &Device, tokens: usize, cuts: &[usize]) {
    let data = Data::new(tokens);
    let [q, k, v, _] = data.views();
    for config in configs() {
        let causal = config.causal;
        let mut race = Race::new(device, config, SHAPE).unwrap();
        let whole = race.forward(&q, &k, &v, None).unwrap();
        let o = whole.o.read_blocking().unwrap().to_f32();
        for &cut in cuts {
            let mut rows = Rows::default();
            let mut state = race.new_state(BATCH).unwrap();
            let mut done = Vec::new();
            let mut progress = |p: softhash::StreamProgress| {
                done.push((p.sweep, p.done, p.total));
                ControlFlow::Continue(())
            };
            let mut options = StreamOptions { progress: Some(&mut progress), ..options(cut) };
            let mut sink = |range, o: softhash::Tensor| {
                rows.take(range, o.read_blocking()?.to_f32());
                Ok(())
            };
            race.forward_stream(&mut state, &mut data.source(), &mut sink, &mut options).unwrap();
            close("o", &rows.whole(tokens, 4 * 12), &o, 2e-6);
            same_state(&race, &state, &whole.state);
            let sweeps = if causal { 1 } else { 2 };
            assert_eq!(done.len(), sweeps * tokens.div_ceil(cut));
            let last = if causal { "attend" } else { "read" };
            assert_eq!(done.last(), Some(&(last, tokens as u64, tokens as u64)));
        }
    }
}

/// All gradients of a backward stream; `boundaries` says how many states the forward stream keeps, if any.
fn stream_backward(race: &mut Race, data: &Data, cut: usize, boundaries: Option<usize>) -> [Vec<f32>; 8] {
    let mut kept = boundaries.map(Boundaries::new);
    if let Some(kept) = &mut kept {
        let mut state = race.new_state(BATCH).unwrap();
        let mut options = StreamOptions { boundaries: Some(kept), ..options(cut) };
        race.forward_stream(&mut state, &mut data.source(), &mut |_, _| Ok(()), &mut options).unwrap();
        assert!(!kept.is_empty() && kept.len() <= boundaries.unwrap().max(2) && kept.bytes() > 0);
    }
    let tokens = data.tokens as u64;
    let mut stream = race.begin_backward_stream(BATCH, tokens, None, None, kept).unwrap();
    let (mut dq, mut dk, mut dv) = (Rows::default(), Rows::default(), Rows::default());
    let mut sink = |range: Range<u64>, g: softhash::SegmentGradients| {
        for (rows, tensor) in [(&mut dq, g.dq), (&mut dk, g.dk), (&mut dv, g.dv)] {
            if let Some(tensor) = tensor {
                rows.take(range.clone(), tensor.read_blocking()?.to_f32());
            }
        }
        Ok(())
    };
    race.backward_stream(&mut stream, &mut data.source(), &mut sink, &mut options(cut)).unwrap();
    assert!(stream.is_done());
    finish(race, stream, [dq, dk, dv], data.tokens)
}

fn finish(race: &Race, stream: BackwardStream, [dq, dk, dv]: [Rows; 3], tokens: usize) -> [Vec<f32>; 8] {
    let sums = stream.finish().unwrap();
    let initial = race.read_state_gradient(&sums.d_initial_state).unwrap();
    let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
    [
        dq.whole(tokens, 4 * 16),
        dk.whole(tokens, 2 * 16),
        dv.whole(tokens, 2 * 12),
        narrow(&sums.d_beta),
        narrow(&sums.d_planes),
        narrow(&initial.a),
        narrow(&initial.b),
        narrow(&sums.d_gate),
    ]
}

fn whole_backward(race: &mut Race, data: &Data) -> [Vec<f32>; 8] {
    let [q, k, v, g] = data.views();
    let out = race.backward(&q, &k, &v, &g, None, None, &RaceOptions::default()).unwrap();
    let initial = race.read_state_gradient(&out.d_initial_state).unwrap();
    let narrow = |x: &[f64]| x.iter().map(|&x| x as f32).collect::<Vec<_>>();
    let [dq, dk, dv, beta, planes] =
        [&out.dq, &out.dk, &out.dv, &out.d_beta, &out.d_planes].map(|t| t.read_blocking().unwrap().to_f32());
    let gate = out.d_gate.map(|t| t.read_blocking().unwrap().to_f32()).unwrap_or_default();
    [dq, dk, dv, beta, planes, narrow(&initial.a), narrow(&initial.b), gate]
}

const NAMES: [&str; 8] = ["dq", "dk", "dv", "d_beta", "d_planes", "dA", "dB", "d_gate"];

fn backward_streams_equal_the_whole(device: &Device, tokens: usize, cuts: &[(usize, Option<usize>)]) {
    let data = Data::new(tokens);
    for config in configs() {
        let (causal, window) = (config.causal, config.window);
        let mut race = Race::new(device, config, SHAPE).unwrap();
        let whole = whole_backward(&mut race, &data);
        for &(cut, boundaries) in cuts {
            let streamed = stream_backward(&mut race, &data, cut, boundaries);
            for ((name, got), want) in NAMES.iter().zip(&streamed).zip(&whole) {
                close(&format!("{name}, causal {causal}, window {window}, cut {cut}, {boundaries:?}"), got, want, 1e-5);
            }
        }
    }
}

/// Segments of any length; a few kept states, so that most are found again; none kept.
const BACKWARD_CUTS: [(usize, Option<usize>); 5] =
    [(7, Some(100)), (7, Some(3)), (40, None), (1, Some(2)), (200, None)];

#[test]
fn forward_on_the_cpu() {
    forward_streams_equal_the_whole(&Device::cpu(), 131, &[1, 7, 64, 130, 131, 500]);
}

#[test]
fn backward_on_the_cpu() {
    backward_streams_equal_the_whole(&Device::cpu(), 83, &BACKWARD_CUTS);
}

#[cfg(feature = "wgpu")]
#[test]
fn forward_on_the_gpu() {
    forward_streams_equal_the_whole(&common::device::gpu(), 131, &[7, 64, 500]);
}

#[cfg(feature = "wgpu")]
#[test]
fn backward_on_the_gpu() {
    backward_streams_equal_the_whole(&common::device::gpu(), 83, &BACKWARD_CUTS[..3]);
}

/// A source that fails once at a token, in a chosen way.
struct Faulty<'a> {
    inner: HostSource<'a>,
    at: u64,
    how: Fault,
}

#[derive(Clone, Copy, PartialEq)]
enum Fault {
    Fails,
    Panics,
    GivesFewer,
    GivesNothing,
    GivesNan,
    Mended,
}

impl SegmentSource for Faulty<'_> {
    fn batch(&self) -> usize {
        self.inner.batch()
    }

    fn tokens(&self) -> u64 {
        self.inner.tokens()
    }

    fn read(&mut self, tokens: Range<u64>, wanted: Wanted) -> Result<Segment, StreamFailure> {
        let mut segment = self.inner.read(tokens.clone(), wanted)?;
        if tokens.contains(&self.at) {
            match self.how {
                Fault::Fails => return Err("the disk is gone".into()),
                Fault::Panics => panic!("a bug of the source"),
                Fault::GivesFewer => segment = self.inner.read(tokens.start..tokens.end - 1, wanted)?,
                Fault::GivesNothing => segment = Segment::default(),
                Fault::GivesNan => {
                    let k = segment.k.take().unwrap();
                    let mut data = k.read_blocking()?.to_f32();
                    data[5] = f32::NAN;
                    segment.k = Some(softhash::Tensor::from_f32(data, k.shape().try_into()?)?);
                }
                Fault::Mended => {}
            }
        }
        Ok(segment)
    }
}

fn forward_goes_on_where_its_source_stopped(device: &Device) {
    let data = Data::new(100);
    let [q, k, v, _] = data.views();
    let mut race = Race::new(device, windowed(), SHAPE).unwrap();
    let whole = race.forward(&q, &k, &v, None).unwrap();
    let faults = [
        (Fault::Fails, "the disk is gone"),
        (Fault::GivesFewer, "asked for 10"),
        (Fault::GivesNothing, "gave no q"),
        (Fault::GivesNan, "NaN"),
        (Fault::Panics, "panicked"),
    ];
    for (how, word) in faults {
        let mut source = Faulty { inner: data.source(), at: 45, how };
        let mut rows = Rows::default();
        let mut state = race.new_state(BATCH).unwrap();
        let mut sink = |range, o: softhash::Tensor| {
            rows.take(range, o.read_blocking()?.to_f32());
            Ok(())
        };
        let mut options = options(10);
        let error = race.forward_stream(&mut state, &mut source, &mut sink, &mut options).unwrap_err();
        let Error::Stream { position, .. } = &error else { panic!("{error}") };
        assert!(error.to_string().contains(word), "{error}");
        // A source that panics has taken its thread's word of the position with it: the state has it.
        assert!(*position == 40 || how == Fault::Panics, "{error}");
        assert_eq!(state.tokens(0), Some(40), "what was delivered is in the state, and no more");
        source.how = Fault::Mended;
        options.from = 40;
        race.forward_stream(&mut state, &mut source, &mut sink, &mut options).unwrap();
        close("o", &rows.whole(100, 4 * 12), &whole.o.read_blocking().unwrap().to_f32(), 2e-6);
        same_state(&race, &state, &whole.state);
    }
}

#[test]
fn a_forward_stream_goes_on_where_its_source_stopped() {
    forward_goes_on_where_its_source_stopped(&Device::cpu());
}

#[cfg(feature = "wgpu")]
#[test]
fn a_forward_stream_on_the_gpu_goes_on_where_its_source_stopped() {
    forward_goes_on_where_its_source_stopped(&common::device::gpu());
}

#[test]
fn a_sink_that_refuses_leaves_the_state_before_its_segment() {
    let data = Data::new(60);
    let mut race = Race::new(&Device::cpu(), windowed(), SHAPE).unwrap();
    let mut state = race.new_state(BATCH).unwrap();
    let mut refuses = |range: Range<u64>, _| if range.start == 20 { Err("no room".into()) } else { Ok(()) };
    let error = race.forward_stream(&mut state, &mut data.source(), &mut refuses, &mut options(20)).unwrap_err();
    assert!(matches!(&error, Error::Stream { op: "forward_stream", position: 20, .. }), "{error}");
    assert!(error.to_string().contains("no room"));
    assert_eq!(state.tokens(0), Some(20));
}

#[test]
fn a_stream_is_cancelled_and_resumed_from_a_saved_state() {
    let data = Data::new(90);
    let [q, k, v, _] = data.views();
    let mut race = Race::new(&Device::cpu(), windowed(), SHAPE).unwrap();
    let whole = race.forward(&q, &k, &v, None).unwrap();
    let mut state = race.new_state(BATCH).unwrap();
    let mut enough = |p: softhash::StreamProgress| {
        if p.done >= 60 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    };
    let mut stopping = StreamOptions { progress: Some(&mut enough), ..options(30) };
    let error = race.forward_stream(&mut state, &mut data.source(), &mut |_, _| Ok(()), &mut stopping).unwrap_err();
    assert!(matches!(error, Error::Cancelled { op: "forward_stream", position: 60 }), "{error}");

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state.safetensors");
    race.save_state_to(&state, &path).unwrap();
    let mut later = Race::new(&Device::cpu(), windowed(), SHAPE).unwrap();
    let mut state = later.load_state_from(&path).unwrap();
    let mut options = StreamOptions { from: state.tokens(0).unwrap(), ..options(30) };
    later.forward_stream(&mut state, &mut data.source(), &mut |_, _| Ok(()), &mut options).unwrap();
    same_state(&later, &state, &whole.state);
}

/// In every phase, a source that fails, a sink that refuses and a caller that cancels leave nothing counted twice.
fn backward_goes_on_where_it_stopped(device: &Device) {
    let data = Data::new(64);
    for config in configs() {
        let (causal, window) = (config.causal, config.window);
        let mut race = Race::new(device, config, SHAPE).unwrap();
        let whole = whole_backward(&mut race, &data);
        let mut stream = race.begin_backward_stream(BATCH, 64, None, None, None).unwrap();
        let (mut dq, mut dk, mut dv) = (Rows::default(), Rows::default(), Rows::default());
        let mut source = Faulty { inner: data.source(), at: 30, how: Fault::Fails };
        let (mut stops, mut refused, mut calls) = (0, false, 0);
        while !stream.is_done() {
            let mut sink = |range: Range<u64>, g: softhash::SegmentGradients| {
                if range.start == 8 && !refused {
                    refused = true;
                    return Err("no room".into());
                }
                for (rows, tensor) in [(&mut dq, g.dq), (&mut dk, g.dk), (&mut dv, g.dv)] {
                    if let Some(tensor) = tensor {
                        rows.take(range.clone(), tensor.read_blocking()?.to_f32());
                    }
                }
                Ok(())
            };
            let mut every_third = |_| {
                calls += 1;
                if calls % 3 == 0 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
            };
            let mut options = StreamOptions { progress: Some(&mut every_third), ..options(8) };
            if let Err(error) = race.backward_stream(&mut stream, &mut source, &mut sink, &mut options) {
                assert!(matches!(error, Error::Stream { .. } | Error::Cancelled { .. }), "{error}");
                stops += 1;
                assert!(stops < 40, "no way forward: {error}");
                source.how = if stops % 2 == 1 { Fault::Mended } else { Fault::Fails };
            }
        }
        assert!(stops > 5 && refused);
        let resumed = finish(&race, stream, [dq, dk, dv], 64);
        for ((name, got), want) in NAMES.iter().zip(&resumed).zip(&whole) {
            close(&format!("{name}, causal {causal}, window {window}"), got, want, 1e-5);
        }
    }
}

#[test]
fn a_backward_stream_goes_on_where_it_stopped() {
    backward_goes_on_where_it_stopped(&Device::cpu());
}

#[cfg(feature = "wgpu")]
#[test]
fn a_backward_stream_on_the_gpu_goes_on_where_it_stopped() {
    backward_goes_on_where_it_stopped(&common::device::gpu());
}

#[test]
fn wrong_calls_are_refused() {
    let data = Data::new(20);
    let mut race = Race::new(&Device::cpu(), config(true), SHAPE).unwrap();
    let mut state = race.new_state(BATCH).unwrap();
    let mut nothing = |_: Range<u64>, _: softhash::Tensor| Ok(());
    let mut run = |race: &mut Race, state: &mut RaceState, mut options: StreamOptions<'_>| {
        race.forward_stream(state, &mut data.source(), &mut nothing, &mut options).unwrap_err()
    };
    let error = run(&mut race, &mut state, options(0));
    assert!(matches!(error, Error::Config { field: "segment_tokens", .. }), "{error}");
    let error = run(&mut race, &mut state, StreamOptions { from: 21, ..options(5) });
    assert!(matches!(error, Error::Limit { what: "first token", value: 21, limit: 20, .. }), "{error}");
    let mut one = race.new_state(1).unwrap();
    let error = run(&mut race, &mut one, options(5));
    assert!(matches!(error, Error::Stream { position: 0, .. }), "{error}");

    let stream = race.begin_backward_stream(BATCH, 19, None, None, None).unwrap();
    assert!(matches!(stream.finish(), Err(Error::Unsupported { op: "finish", .. })));
    let mut stream = race.begin_backward_stream(BATCH, 19, None, None, None).unwrap();
    let error = race.backward_stream(&mut stream, &mut data.source(), &mut |_, _| Ok(()), &mut options(5)).unwrap_err();
    assert!(matches!(error, Error::Shape { tensor: "source", .. }), "{error}");

    let [q, k, v, _] = data.views();
    let short = TensorView::f32(&data.v, [BATCH, 19, 2, 12]);
    assert!(matches!(HostSource::new(q, k, short, None), Err(Error::Shape { tensor: "v", .. })));
    let mut without = HostSource::new(q, k, v, None).unwrap();
    let mut stream = race.begin_backward_stream(BATCH, 20, None, None, None).unwrap();
    let error = race.backward_stream(&mut stream, &mut without, &mut |_, _| Ok(()), &mut options(5)).unwrap_err();
    assert!(error.to_string().contains("gave no grad_o"), "{error}");
}

/// Segments that stay on their device, as lists of tensors.
fn resident_segments_stream(device: &Device) {
    let data = Data::new(50);
    let [q, k, v, _] = data.views();
    let mut race = Race::new(device, config(true), SHAPE).unwrap();
    let whole = race.forward(&q, &k, &v, None).unwrap();
    let all = Wanted { q: true, k: true, v: true, grad_o: true };
    let segments: Vec<Segment> =
        [0..16, 16..32, 32..48, 48..50].map(|range| data.source().read(range, all).unwrap()).to_vec();
    let mut source = ResidentSource::new(segments.clone()).unwrap();
    assert_eq!((source.segment_tokens(), source.tokens(), source.batch()), (16, 50, BATCH));
    let mut state = race.new_state(BATCH).unwrap();
    let cut = source.segment_tokens();
    race.forward_stream(&mut state, &mut source, &mut |_, _| Ok(()), &mut options(cut)).unwrap();
    same_state(&race, &state, &whole.state);
    let error = race.forward_stream(&mut state, &mut source, &mut |_, _| Ok(()), &mut options(15)).unwrap_err();
    assert!(error.to_string().contains("are no segment"), "{error}");

    assert!(matches!(ResidentSource::new(Vec::new()), Err(Error::Shape { tensor: "segments", .. })));
    let mut lacking = segments.clone();
    lacking[1].v = None;
    assert!(matches!(ResidentSource::new(lacking), Err(Error::Shape { tensor: "v", .. })));
    let mut swapped = segments.clone();
    swapped.swap(1, 3);
    assert!(matches!(ResidentSource::new(swapped), Err(Error::Shape { tensor: "q", .. })));
}

#[test]
fn resident_segments_stream_on_the_cpu() {
    resident_segments_stream(&Device::cpu());
}

#[cfg(feature = "mmap")]
mod files {
    use super::*;
    use safetensors::tensor::{Dtype, TensorView as Saved, serialize};
    use softhash::SafetensorsSource;
    use std::path::Path;

    fn write(path: &Path, tensors: &[(&str, Vec<usize>, &[f32])]) {
        let bytes: Vec<Vec<u8>> = tensors.iter().map(|(_, _, x)| bytemuck::cast_slice(x).to_vec()).collect();
        let views = tensors
            .iter()
            .zip(&bytes)
            .map(|((name, shape, _), bytes)| (*name, Saved::new(Dtype::F32, shape.clone(), bytes).unwrap()));
        std::fs::write(path, serialize(views, None).unwrap()).unwrap();
    }

    #[test]
    fn a_mapped_file_gives_what_host_memory_gives() {
        let data = Data::new(50);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sequence.safetensors");
        let shape = |heads, dim| vec![BATCH, 50, heads, dim];
        let (q, k, v, g) = (shape(4, 16), shape(2, 16), shape(2, 12), shape(4, 12));
        write(
            &path,
            &[
                ("q", q.clone(), &data.q),
                ("k", k.clone(), &data.k),
                ("v", v.clone(), &data.v),
                ("grad_o", g, &data.grad_o),
            ],
        );
        let mut file = SafetensorsSource::open(&path).unwrap();
        assert_eq!((file.batch(), file.tokens()), (BATCH, 50));
        let all = Wanted { q: true, k: true, v: true, grad_o: true };
        for range in [0..50, 0..1, 13..37, 49..50] {
            let (got, want) = (file.read(range.clone(), all).unwrap(), data.source().read(range, all).unwrap());
            for (got, want) in [(got.q, want.q), (got.k, want.k), (got.v, want.v), (got.grad_o, want.grad_o)] {
                let (got, want) = (got.unwrap(), want.unwrap());
                assert_eq!(got.shape(), want.shape());
                assert_eq!(got.read_blocking().unwrap().to_f32(), want.read_blocking().unwrap().to_f32());
            }
        }
        assert!(file.read(40..51, all).is_err());
        let none = file.read(0..5, Wanted::default()).unwrap();
        assert!(none.q.is_none() && none.grad_o.is_none());

        // A stream from the file, with no gradient in it.
        write(&path, &[("q", q.clone(), &data.q), ("k", k.clone(), &data.k), ("v", v.clone(), &data.v)]);
        let mut race = Race::new(&Device::cpu(), config(true), SHAPE).unwrap();
        let mut state = race.new_state(BATCH).unwrap();
        let mut file = SafetensorsSource::open(&path).unwrap();
        race.forward_stream(&mut state, &mut file, &mut |_, _| Ok(()), &mut options(16)).unwrap();
        assert_eq!(state.tokens(0), Some(50));

        // Hostile files.
        let refused = |path: &Path, word: &str| {
            let error = SafetensorsSource::open(path).unwrap_err();
            assert!(matches!(error, Error::File { .. }) && error.to_string().contains(word), "{error}");
        };
        write(&path, &[("q", q.clone(), &data.q), ("k", k.clone(), &data.k)]);
        refused(&path, "tensor v is missing");
        write(&path, &[("q", vec![BATCH * 50, 64], &data.q), ("k", k.clone(), &data.k), ("v", v.clone(), &data.v)]);
        refused(&path, "tensor");
        write(&path, &[("q", q, &data.q), ("k", vec![1, 100, 2, 16], &data.k), ("v", v, &data.v)]);
        refused(&path, "tensor k has shape");
        let bytes = std::fs::read(&path).unwrap();
        std::fs::write(&path, &bytes[..bytes.len() - 7]).unwrap();
        refused(&path, "sequence.safetensors");
        refused(&folder.path().join("absent"), "absent");
    }
}
