//! RACE's forward on a GPU against the f64 reference.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    pub mod device;
    #[allow(dead_code, reason = "each test takes what it needs")]
    pub mod race;
}

use common::device::gpu;
use common::race::{ALL, Case, Data, Elements, error, wide};
use softhash::race::reference as math;
use softhash::{DType, Device, Normalization, Race, RaceOptions, RaceState, TensorView};
use std::ops::Range;
use std::sync::OnceLock;

/// One device for all tests, so that each kernel is compiled once.
fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(gpu)
}

struct Found {
    o: Vec<f64>,
    a: Vec<f64>,
    b: Vec<f64>,
}

impl Case {
    fn race(&self, data: &Data) -> Race {
        self.race_on(device(), data)
    }

    fn initial(&self, race: &Race, data: &Data) -> RaceState {
        race.write_state(&data.initial, &vec![0; self.batch()]).unwrap()
    }

    /// The reference's word.
    fn reference(&self, data: &Data) -> Found {
        let (hq, dv) = (self.heads.0, self.dims.1);
        let group = hq / self.heads.1;
        let mut o = vec![0.0; self.batch() * self.tokens * hq * dv];
        let (mut a, mut b) = (Vec::new(), Vec::new());
        self.each_unit(data, &mut |unit| {
            let (heads, last) = math::forward(&unit.problem, &unit.initial);
            for (g, rows) in heads.iter().enumerate() {
                let weight = 1.0 / self.ensembles as f64;
                self.add_rows(&mut o, unit.batch, hq, unit.kv_head * group + g, rows, weight);
            }
            a.extend(last.a);
            b.extend(last.b);
        });
        Found { o, a, b }
    }

    fn forward(&self, data: &Data) -> Found {
        let mut race = self.race(data);
        let [q, k, v, _] = self.elements(data);
        let [of_q, of_k, of_v, _] = self.shapes();
        let initial = if self.initial { Some(self.initial(&race, data)) } else { None };
        let out =
            race.forward_with(&q.view(of_q), &k.view(of_k), &v.view(of_v), initial.as_ref(), &self.options()).unwrap();
        assert_eq!(out.o.shape(), [of_q[0], of_q[1], of_q[2], of_v[3]]);
        assert_eq!(out.o.dtype(), self.output);
        for (b, &length) in self.lengths.iter().enumerate() {
            assert_eq!(out.state.tokens(b), Some(length as u64));
        }
        let parts = race.read_state(&out.state).unwrap();
        Found { o: wide(&out.o), a: parts.a, b: parts.b }
    }

    fn judge(&self) {
        let data = self.data();
        let (got, want) = (self.forward(&data), self.reference(&data));
        self.compare(&got, &want);
    }

    fn compare(&self, got: &Found, want: &Found) {
        let rounding = match self.output {
            DType::F16 => 3e-4,
            DType::Bf16 => 2.4e-3,
            _ => 0.0,
        };
        let name = self.name();
        let row = self.heads.0 * self.dims.1;
        for (b, &length) in self.lengths.iter().enumerate() {
            let padding = (b * self.tokens + length) * row..(b + 1) * self.tokens * row;
            assert!(got.o[padding].iter().all(|&x| x == 0.0), "{name}: padding of sequence {b}");
        }
        for (what, got, want, bound) in
            [("o", &got.o, &want.o, 5e-6 + rounding), ("A", &got.a, &want.a, 2e-6), ("B", &got.b, &want.b, 2e-6)]
        {
            let e = error(got, want);
            assert!(e <= bound, "{name}: {what} is off by {e:.2e}");
        }
    }
}

#[test]
fn any_length() {
    for normalization in [Normalization::Ratio, Normalization::BucketMean] {
        for tokens in [1, 2, 31, 33, 63, 65, 100, 257] {
            Case { normalization, tokens, lengths: vec![tokens], ..Case::default() }.judge();
        }
    }
}

#[test]
fn any_normalization_causal_or_not_with_a_state_or_without() {
    for normalization in ALL {
        for causal in [true, false] {
            for initial in [true, false] {
                for beta in [0.1, 1.0, 4.0] {
                    let case = Case { normalization, causal, initial, betas: vec![beta], ..Case::default() };
                    Case { heads: (4, 2), tokens: 100, lengths: vec![100], hash: (3, 3), ..case }.judge();
                }
            }
        }
    }
}

#[test]
fn any_shape() {
    let ragged = |case: Case| Case { tokens: 70, lengths: vec![70, 0, 33, 64], ..case };
    for (i, (heads, dims, hash)) in [
        ((1, 1), (64, 64), (2, 2)),
        ((4, 1), (80, 64), (4, 4)),
        ((4, 4), (128, 128), (1, 1)),
        ((8, 2), (128, 80), (5, 3)),
        ((3, 1), (5, 7), (2, 6)),
        ((2, 1), (16, 200), (1, 8)),
        ((2, 2), (17, 1), (20, 2)),
    ]
    .into_iter()
    .enumerate()
    {
        for (j, normalization) in [Normalization::Ratio, Normalization::BucketMean].into_iter().enumerate() {
            ragged(Case { heads, dims, hash, normalization, causal: (i + j) % 3 > 0, ..Case::default() }).judge();
        }
    }
}

#[test]
fn ensembles_are_averaged() {
    for normalization in ALL {
        for (causal, output) in [(true, DType::F32), (false, DType::F32), (true, DType::Bf16)] {
            let case = Case { ensembles: 3, normalization, causal, output, hash: (2, 3), ..Case::default() };
            Case { heads: (4, 2), dims: (32, 36), per_head: true, betas: vec![0.2, 3.0], initial: true, ..case }
                .judge();
        }
    }
}

#[test]
fn any_dtype() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        for output in [DType::F32, DType::F16, DType::Bf16] {
            for causal in [true, false] {
                let case = Case { dtype, output, causal, dims: (64, 72), hash: (2, 2), ..Case::default() };
                Case { tokens: 67, lengths: vec![3, 67], ..case }.judge();
            }
        }
    }
}

#[test]
fn many_buckets_and_channels() {
    for normalization in [Normalization::Ratio, Normalization::BucketMean] {
        let case = Case { heads: (2, 2), dims: (16, 512), hash: (16, 8), normalization, ..Case::default() };
        Case { tokens: 40, lengths: vec![40], betas: vec![1.0, 5.0], ..case }.judge();
    }
}

/// With a flat hash the part of o that depends on the query is a hundredth of it.
#[test]
fn what_depends_on_the_query_survives() {
    for normalization in [Normalization::Ratio, Normalization::BucketMean] {
        let tokens = 4096;
        let case = Case {
            heads: (1, 1),
            dims: (128, 16),
            hash: (2, 2),
            betas: vec![(1.0 / 128f64.sqrt()) as f32],
            normalization,
            causal: false,
            tokens,
            lengths: vec![tokens],
            offset: 3.0,
            ..Case::default()
        };
        let mut data = case.data();
        // Values that keys tell something of.
        for (v, k) in data.v.chunks_exact_mut(case.dims.1).zip(data.k.chunks_exact(case.dims.0)) {
            v.iter_mut().zip(k).for_each(|(v, k)| *v += 10.0 * k);
        }
        let (got, want) = (case.forward(&data), case.reference(&data));
        case.compare(&got, &want);
        let varying = |o: &[f64]| -> Vec<f64> {
            let dim = case.dims.1;
            let mean: Vec<f64> = (0..dim).map(|c| o.iter().skip(c).step_by(dim).sum::<f64>() / tokens as f64).collect();
            o.iter().enumerate().map(|(i, x)| x - mean[i % dim]).collect()
        };
        let e = error(&varying(&got.o), &varying(&want.o));
        let rounded: Vec<f64> = want.o.iter().map(|&x| f64::from(x as f32)).collect();
        let least = error(&varying(&rounded), &varying(&want.o));
        println!("{normalization:?}: {e:.2e}, {least:.2e} by the rounding of o alone");
        assert!(e < 1e-3 && e < 2.0 * least, "{normalization:?}: {e:.2e}, and {least:.2e} by the rounding of o alone");
        let causal = Case { causal: true, ..case.clone() };
        causal.compare(&causal.forward(&data), &causal.reference(&data));
    }
}

#[test]
fn single_steps() {
    let step = |case: Case| Case { tokens: 1, lengths: vec![1, 0, 1], initial: true, ..case };
    for (heads, dims, hash, ensembles, dtype, output) in [
        ((4, 1), (64, 64), (4, 4), 1, DType::F32, DType::F32),
        ((10, 2), (80, 70), (5, 6), 1, DType::Bf16, DType::F16),
        ((2, 2), (128, 130), (2, 8), 2, DType::F16, DType::Bf16),
        ((3, 1), (7, 5), (64, 6), 1, DType::F32, DType::F32),
    ] {
        for normalization in [Normalization::Ratio, Normalization::BucketSum] {
            for beta in [0.2, 4.0] {
                let betas = vec![beta];
                let base =
                    Case { heads, dims, hash, ensembles, dtype, output, betas, normalization, ..Case::default() };
                step(base).judge();
            }
        }
    }
}

fn tokens_of<'a>(
    x: &'a Elements,
    [_, _, h, d]: [usize; 4],
    all: usize,
    batch: usize,
    t: &Range<usize>,
) -> TensorView<'a> {
    let strides = [all * h * d, h * d, d, 1];
    let shape = [batch, t.len(), h, d];
    match x {
        Elements::F32(x) => TensorView::f32(&x[t.start * h * d..], shape),
        Elements::F16(x) => TensorView::f16(&x[t.start * h * d..], shape),
        Elements::Bf16(x) => TensorView::bf16(&x[t.start * h * d..], shape),
    }
    .with_strides(strides)
}

/// However a sequence is cut, outputs and state are those of the whole.
#[test]
fn prompts_appends_and_steps_are_one() {
    for normalization in [Normalization::Ratio, Normalization::BucketMean] {
        for (ensembles, dtype) in [(1, DType::F32), (2, DType::Bf16)] {
            let base = Case { ensembles, dtype, normalization, ..Case::default() };
            let case = Case { heads: (6, 2), dims: (32, 34), hash: (3, 3), tokens: 150, lengths: vec![150; 2], ..base };
            let case = Case { betas: vec![0.3, 3.0], ..case };
            let data = case.data();
            let want = case.reference(&data);
            let [q, k, v, _] = case.elements(&data);
            let [of_q, of_k, of_v, _] = case.shapes();
            let mut race = case.race(&data);
            let mut state = race.new_state(2).unwrap();
            let row = case.heads.0 * case.dims.1;
            let mut o = vec![0.0; want.o.len()];
            let options = RaceOptions { output: Some(DType::F32), ..RaceOptions::default() };
            let mut cut = 0;
            for length in [70, 1, 1, 3, 1, 16, 40, 1, 1, 1, 2, 12, 1] {
                let range = cut..cut + length;
                let part = |x, shape| tokens_of(x, shape, case.tokens, 2, &range);
                let (q, k, v) = (part(&q, of_q), part(&k, of_k), part(&v, of_v));
                let found = wide(&race.append_with(&mut state, &q, &k, &v, &options).unwrap());
                for b in 0..2 {
                    let to = (b * case.tokens + cut) * row;
                    o[to..to + length * row].copy_from_slice(&found[b * length * row..(b + 1) * length * row]);
                }
                cut += length;
            }
            assert_eq!((cut, state.tokens(1)), (150, Some(150)));
            let parts = race.read_state(&state).unwrap();
            case.compare(&Found { o, a: parts.a, b: parts.b }, &want);
        }
    }
}

#[test]
fn states_come_back_to_the_bit_and_forks_part() {
    let case = Case { heads: (2, 2), dims: (16, 20), hash: (2, 3), initial: true, ensembles: 2, ..Case::default() };
    let data = case.data();
    let mut race = case.race(&data);
    let [q, k, v, _] = case.elements(&data);
    let [of_q, of_k, of_v, _] = case.shapes();
    let (q, k, v) = (q.view(of_q), k.view(of_k), v.view(of_v));
    let mut state = case.initial(&race, &data);
    race.append(&mut state, &q, &k, &v).unwrap();
    let parts = race.read_state(&state).unwrap();
    let again = race.write_state(&parts, &[65]).unwrap();
    assert_eq!(race.read_state(&again).unwrap(), parts);
    // What was written is there to 48 bits.
    let written = race.read_state(&case.initial(&race, &data)).unwrap();
    assert!(error(&written.b, &data.initial.b) < 1e-14 && error(&written.a, &data.initial.a) < 1e-14);
    let fork = race.fork(&state).unwrap();
    race.append(&mut state, &q, &k, &v).unwrap();
    assert_eq!(race.read_state(&fork).unwrap(), parts);
    assert_ne!(race.read_state(&state).unwrap(), parts);
}

/// After 10⁹ tokens a token still counts, in chunks and in steps.
#[test]
fn long_contexts_forget_nothing() {
    for betas in [vec![0.1], vec![4.0]] {
        let case = Case { dims: (16, 12), hash: (3, 2), betas, initial: true, ..Case::default() };
        let mut data = case.data();
        data.initial.a.iter_mut().for_each(|a| *a += 1e9);
        data.initial.b.iter_mut().for_each(|b| *b += 3e9);
        let mut race = case.race(&data);
        let mut state = case.initial(&race, &data);
        let [q, k, v, _] = case.elements(&data);
        let [of_q, of_k, of_v, _] = case.shapes();
        for range in [0..60, 60..61, 61..64, 64..65] {
            let part = |x, shape| tokens_of(x, shape, case.tokens, 1, &range);
            race.append(&mut state, &part(&q, of_q), &part(&k, of_k), &part(&v, of_v)).unwrap();
        }
        let (got, want) = (race.read_state(&state).unwrap(), case.reference(&data));
        let added = |x: &[f64], before: &[f64]| -> Vec<f64> { x.iter().zip(before).map(|(x, y)| x - y).collect() };
        let a = error(&added(&got.a, &data.initial.a), &added(&want.a, &data.initial.a));
        let b = error(&added(&got.b, &data.initial.b), &added(&want.b, &data.initial.b));
        assert!(a < 3e-6 && b < 3e-6, "A {a:.2e}, B {b:.2e}");
    }
}
