//! RACE on the CPU: random problems against the f64 reference, and the laws that need no reference.
//!
//! The stream of problems is the same in every run; `PROPTEST_CASES` asks for more of it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    #[allow(dead_code, reason = "each test takes what it needs")]
    pub mod race;
}

use common::race::{ALL, Case, Data, Elements, error, noise, wide};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use softhash::race::reference as math;
use softhash::{DType, Device, Error, Normalization, Race, RaceOptions, RaceShape, StateParts, Tensor, TensorView};
use std::ops::Range;

/// ‖x − ref‖ / ‖ref‖ of outputs, states and dv; of the gradients that pass a hash; of that of β, beside [`BETA_SLACK`].
const FORWARD: f64 = 2e-6;
const GRADIENT: f64 = 2e-5;
const BETA: f64 = 1e-4;

/// Of ‖grad_o‖·β (times ‖w‖ where a gradient passes the planes): the size of the parts of which gradients are sums, and
/// which may cancel altogether, as in a sequence of one token.
const SLACK: f64 = 5e-7;

/// Everything that a call computes: forward and backward.
#[derive(Clone, Debug, Default)]
struct Results {
    o: Vec<f64>,
    last: StateParts,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    dbeta: Vec<f64>,
    dplanes: Vec<f64>,
    dinitial: StateParts,
}

impl Results {
    /// Names of the parts, their errors, and what these may be.
    fn errors(&self, want: &Self, case: &Case, data: &Data) -> Vec<(&'static str, f64, f64)> {
        // Half of the last place of the output's own rounding.
        let rounding = match case.output {
            DType::F16 => 2f64.powi(-11),
            DType::Bf16 => 2f64.powi(-8),
            _ => 0.0,
        };
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let off = |x: &[f64], y: &[f64]| norm(&x.iter().zip(y).map(|(x, y)| x - y).collect::<Vec<_>>());
        let grad_o = norm(&data.grad_o.iter().map(|x| f64::from(*x)).collect::<Vec<_>>());
        let beta = case.betas.iter().fold(0f32, |max, beta| max.max(*beta));
        let slack = SLACK * grad_o * f64::from(beta.max(1.0));
        let parts: [(_, &[f64], &[f64], f64, f64); 10] = [
            ("o", &self.o, &want.o, FORWARD + rounding, 0.0),
            ("A", &self.last.a, &want.last.a, FORWARD, 0.0),
            ("B", &self.last.b, &want.last.b, FORWARD, 0.0),
            ("dq", &self.dq, &want.dq, GRADIENT, slack * (case.dims.0 as f64).sqrt()),
            ("dk", &self.dk, &want.dk, GRADIENT, slack * (case.dims.0 as f64).sqrt()),
            ("dv", &self.dv, &want.dv, FORWARD, 0.0),
            ("dplanes", &self.dplanes, &want.dplanes, GRADIENT, slack),
            ("dbeta", &self.dbeta, &want.dbeta, BETA, slack),
            ("dA", &self.dinitial.a, &want.dinitial.a, GRADIENT, slack),
            ("dB", &self.dinitial.b, &want.dinitial.b, FORWARD, 0.0),
        ];
        parts.map(|(name, x, y, relative, slack)| (name, off(x, y), relative * norm(y) + slack)).into()
    }

    fn check(&self, want: &Self, case: &Case, data: &Data) -> Result<(), String> {
        let wrong: Vec<_> =
            self.errors(want, case, data).into_iter().filter(|(_, e, bound)| e.is_nan() || e > bound).collect();
        if wrong.is_empty() { Ok(()) } else { Err(format!("{wrong:?}")) }
    }
}

/// What the reference says.
fn expected(case: &Case, data: &Data) -> Results {
    let (hq, hkv) = case.heads;
    let rows = case.batch() * case.tokens;
    let room = |heads, dim| vec![0.0; rows * heads * dim];
    let mut out = Results {
        o: room(hq, case.dims.1),
        dq: room(hq, case.dims.0),
        dk: room(hkv, case.dims.0),
        dv: room(hkv, case.dims.1),
        dbeta: vec![0.0; case.betas.len()],
        dplanes: vec![0.0; data.planes.len()],
        ..Results::default()
    };
    let share = 1.0 / case.ensembles as f64;
    case.each_unit(data, &mut |unit| {
        let head = |g: usize| unit.kv_head * (hq / hkv) + g;
        let (o, last) = math::forward(&unit.problem, &unit.initial);
        let grads: Vec<Vec<f64>> = (0..hq / hkv)
            .map(|g| case.rows(&data.grad_o, unit.batch, hq, head(g), case.dims.1))
            .map(|rows| rows.iter().map(|x| x * share).collect())
            .collect();
        let grads: Vec<&[f64]> = grads.iter().map(Vec::as_slice).collect();
        let grad_final = case.state(&data.grad_final, unit.batch, unit.kv_head, unit.ensemble);
        let back = math::backward(&unit.problem, &unit.initial, &grads, &grad_final);
        for (g, (o, dq)) in o.iter().zip(&back.dq).enumerate() {
            case.add_rows(&mut out.o, unit.batch, hq, head(g), o, share);
            case.add_rows(&mut out.dq, unit.batch, hq, head(g), dq, 1.0);
        }
        case.add_rows(&mut out.dk, unit.batch, hkv, unit.kv_head, &back.dk, 1.0);
        case.add_rows(&mut out.dv, unit.batch, hkv, unit.kv_head, &back.dv, 1.0);
        out.last.a.extend(last.a);
        out.last.b.extend(last.b);
        out.dinitial.a.extend(back.dinitial.a);
        out.dinitial.b.extend(back.dinitial.b);
        out.dbeta[unit.kv_head % case.betas.len()] += back.dbeta;
        let set = if case.per_head { unit.kv_head } else { 0 };
        let at = (set * case.ensembles + unit.ensemble) * back.dplanes.len();
        out.dplanes[at..].iter_mut().zip(back.dplanes).for_each(|(x, y)| *x += y);
    });
    out
}

/// What the CPU says.
fn computed(case: &Case, data: &Data) -> Results {
    let mut race = case.race_on(&Device::cpu(), data);
    let elements = case.elements(data);
    let shapes = case.shapes();
    let [q, k, v, g]: [TensorView<'_>; 4] = std::array::from_fn(|i| elements[i].view(shapes[i]));
    let tokens = vec![0; case.batch()];
    let initial = case.initial.then(|| race.write_state(&data.initial, &tokens).unwrap());
    let grad_final = case.initial.then(|| race.write_state_gradient(&data.grad_final, case.batch()).unwrap());
    let out = race.forward_with(&q, &k, &v, initial.as_ref(), &case.options()).unwrap();
    let back = race.backward(&q, &k, &v, &g, initial.as_ref(), grad_final.as_ref(), &case.options()).unwrap();
    assert_eq!(out.o.dtype(), case.output);
    for (i, &length) in case.lengths.iter().enumerate() {
        assert_eq!(out.state.tokens(i), Some(length as u64));
    }
    Results {
        o: wide(&out.o),
        last: race.read_state(&out.state).unwrap(),
        dq: wide(&back.dq),
        dk: wide(&back.dk),
        dv: wide(&back.dv),
        dbeta: wide(&back.d_beta),
        dplanes: wide(&back.d_planes),
        dinitial: race.read_state_gradient(&back.d_initial_state).unwrap(),
    }
}

fn any_case() -> impl Strategy<Value = Case> {
    let lengths = prop::collection::vec(prop::sample::select(vec![0usize, 1, 2, 63, 65, 100, 257]), 1..=3);
    let heads = (prop::sample::select(vec![1usize, 4, 8]), 1..=2usize);
    let dims =
        (prop::sample::select(vec![64usize, 80, 96, 128, 33]), prop::sample::select(vec![64usize, 80, 96, 128, 33, 7]));
    let hash = prop::sample::select(vec![(2usize, 2usize), (3, 3), (4, 4), (1, 1), (5, 1), (1, 6)]);
    let dtypes = (0..3usize, any::<bool>());
    let beta = prop::sample::select(vec![0.1f32, 1.0, 4.0]);
    let flags = (any::<bool>(), any::<bool>(), any::<bool>(), any::<bool>());
    (lengths, heads, dims, hash, 1..=2usize, dtypes, beta, 0..3usize, flags).prop_map(
        |(mut lengths, (group, kv_heads), dims, hash, ensembles, dtypes, beta, normalization, flags)| {
            let (causal, initial, per_head, per_beta) = flags;
            // One long sequence at most, with few heads: the reference is slow.
            let mut long = group * kv_heads > 8;
            for length in &mut lengths {
                if *length > 100 && std::mem::replace(&mut long, true) {
                    *length = 65;
                }
            }
            let dtype = [DType::F32, DType::F16, DType::Bf16][dtypes.0];
            Case {
                heads: (group * kv_heads, kv_heads),
                dims,
                hash,
                ensembles,
                betas: if per_beta { (0..kv_heads).map(|h| beta * (1.0 + h as f32)).collect() } else { vec![beta] },
                normalization: ALL[normalization],
                causal,
                dtype,
                output: if dtypes.1 { DType::F32 } else { dtype },
                tokens: lengths.iter().copied().max().unwrap_or(0) + 1,
                lengths,
                initial,
                per_head,
                ..Case::default()
            }
        },
    )
}

#[test]
fn random_problems_match_the_reference() {
    let cases = std::env::var("PROPTEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(60);
    let config = Config { cases, max_shrink_iters: 60, failure_persistence: None, ..Config::default() };
    let mut runner = TestRunner::new_with_rng(config, TestRng::deterministic_rng(RngAlgorithm::ChaCha));
    let law = |case: Case| {
        let data = case.data();
        let verdict = computed(&case, &data).check(&expected(&case, &data), &case, &data);
        verdict.map_err(|e| TestCaseError::fail(format!("{}: {e}", case.name())))
    };
    if let Err(failure) = runner.run(&any_case(), law) {
        panic!("{failure}");
    }
}

/// A thousand buckets, and a context of many blocks of chunks.
#[test]
fn large_problems_match_the_reference() {
    let wide = Case { hash: (4, 8), dims: (32, 24), tokens: 140, lengths: vec![140], initial: true, ..Case::default() };
    let long =
        Case { hash: (2, 2), dims: (8, 8), tokens: 3000, lengths: vec![3000, 1], initial: true, ..Case::default() };
    for case in [wide, long] {
        for normalization in [Normalization::Ratio, Normalization::BucketMean] {
            let case = Case { normalization, ..case.clone() };
            let data = case.data();
            let verdict = computed(&case, &data).check(&expected(&case, &data), &case, &data);
            assert_eq!(verdict, Ok(()), "{}", case.name());
        }
    }
}

/// The comparison sees errors of one part in ten thousand wherever they are, and rows that were read from padding.
#[test]
fn planted_errors_are_found() {
    let case = Case { initial: true, tokens: 66, ..Case::default() };
    let data = case.data();
    let (got, want) = (computed(&case, &data), expected(&case, &data));
    assert_eq!(got.check(&want, &case, &data), Ok(()));
    type Part = fn(&mut Results) -> &mut Vec<f64>;
    let parts: [(&str, Part); 10] = [
        ("o", |r| &mut r.o),
        ("A", |r| &mut r.last.a),
        ("B", |r| &mut r.last.b),
        ("dq", |r| &mut r.dq),
        ("dk", |r| &mut r.dk),
        ("dv", |r| &mut r.dv),
        ("dbeta", |r| &mut r.dbeta),
        ("dplanes", |r| &mut r.dplanes),
        ("dA", |r| &mut r.dinitial.a),
        ("dB", |r| &mut r.dinitial.b),
    ];
    for (name, part) in parts {
        let mut wrong = got.clone();
        // One element by as much as the whole is large times a ten-thousandth; β's has slack.
        let size = part(&mut wrong).iter().map(|x| x * x).sum::<f64>().sqrt();
        part(&mut wrong)[0] += size * if name == "dbeta" { 1e-2 } else { 1e-4 };
        let verdict = wrong.check(&want, &case, &data);
        assert!(verdict.as_ref().is_err_and(|e| e.contains(name)), "{name}: {verdict:?}");
        let mut wrong = got.clone();
        *part(&mut wrong).last_mut().unwrap() = f64::NAN;
        assert!(wrong.check(&want, &case, &data).is_err(), "NaN in {name}");
    }
    // A causal slip: a model that reads one token ahead is another model.
    let ahead = expected(&Case { causal: false, ..case.clone() }, &data);
    assert!(got.check(&ahead, &case, &data).is_err());
}

/// A part of a case's tokens, of its first sequence.
fn part(case: &Case, x: &[f32], heads: usize, dim: usize, tokens: Range<usize>) -> Elements {
    Elements::new(case.dtype, &x[tokens.start * heads * dim..tokens.end * heads * dim])
}

/// Any split of a sequence gives what the whole gives: outputs, state, and all gradients.
#[test]
fn splits_agree_with_the_whole() {
    for (i, normalization) in ALL.into_iter().enumerate() {
        let n = 300;
        let (heads, dims, ensembles) = ((4, 2), (64, 48), 2);
        let base = Case { heads, dims, ensembles, hash: (3, 3), normalization, initial: true, ..Case::default() };
        let whole = Case { tokens: n, lengths: vec![n], ..base };
        let data = whole.data();
        let want = computed(&whole, &data);
        let ends: Vec<usize> = [vec![1, 2, 3, 66, 131, 200, n], vec![64, 65, 129, n], vec![97, n]][i].clone();
        let mut race = whole.race_on(&Device::cpu(), &data);
        let mut got = Results { dbeta: vec![0.0], dplanes: vec![0.0; data.planes.len()], ..Results::default() };
        let parts: Vec<Range<usize>> =
            std::iter::once(0).chain(ends.iter().copied()).zip(ends.iter().copied()).map(|(a, b)| a..b).collect();
        let views = |tokens: &Range<usize>| {
            [
                part(&whole, &data.q, 4, 64, tokens.clone()),
                part(&whole, &data.k, 2, 64, tokens.clone()),
                part(&whole, &data.v, 2, 48, tokens.clone()),
                part(&whole, &data.grad_o, 4, 48, tokens.clone()),
            ]
        };
        let shapes = |tokens: &Range<usize>| {
            let of = |heads, dim| [1, tokens.len(), heads, dim];
            [of(4, 64), of(2, 64), of(2, 48), of(4, 48)]
        };
        let mut state = race.write_state(&data.initial, &[0]).unwrap();
        let mut starts = Vec::new();
        for tokens in &parts {
            starts.push(race.fork(&state).unwrap());
            let (x, s) = (views(tokens), shapes(tokens));
            let o = race.append(&mut state, &x[0].view(s[0]), &x[1].view(s[1]), &x[2].view(s[2])).unwrap();
            got.o.extend(wide(&o));
        }
        assert_eq!(state.tokens(0), Some(n as u64));
        got.last = race.read_state(&state).unwrap();
        let mut gradient = race.write_state_gradient(&data.grad_final, 1).unwrap();
        for (tokens, start) in parts.iter().zip(&starts).rev() {
            let (x, s) = (views(tokens), shapes(tokens));
            let [q, k, v, g] = [0, 1, 2, 3].map(|i| x[i].view(s[i]));
            let back = race.backward(&q, &k, &v, &g, Some(start), Some(&gradient), &RaceOptions::default()).unwrap();
            for (all, part) in [(&mut got.dq, &back.dq), (&mut got.dk, &back.dk), (&mut got.dv, &back.dv)] {
                *all = wide(part).into_iter().chain(std::mem::take(all)).collect();
            }
            got.dbeta.iter_mut().zip(wide(&back.d_beta)).for_each(|(x, y)| *x += y);
            got.dplanes.iter_mut().zip(wide(&back.d_planes)).for_each(|(x, y)| *x += y);
            gradient = back.d_initial_state;
        }
        got.dinitial = race.read_state_gradient(&gradient).unwrap();
        assert_eq!(got.check(&want, &whole, &data), Ok(()), "{normalization:?}");
        // Sums in f64 of chunks in f32.
        assert!(error(&got.last.b, &want.last.b) < 2e-7);
    }
}

/// However many threads share a call, the results are the same but for rounding: with eight, a long sequence is cut.
#[test]
fn threads_agree() {
    let on = |threads: usize, case: &Case, data: &Data| {
        rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap().install(|| computed(case, data))
    };
    for normalization in [Normalization::Ratio, Normalization::BucketMean] {
        for causal in [true, false] {
            let (tokens, lengths) = (5000, vec![5000, 70, 0, 2500]);
            let (heads, dims) = ((2, 1), (32, 16));
            let hash = (2, 2);
            let case =
                Case { heads, dims, hash, normalization, causal, tokens, lengths, initial: true, ..Case::default() };
            let data = case.data();
            let (one, eight) = (on(1, &case, &data), on(8, &case, &data));
            assert_eq!(eight.check(&one, &case, &data), Ok(()), "{}", case.name());
            let again = on(8, &case, &data);
            assert!(again.o == eight.o && again.dk == eight.dk && again.dplanes == eight.dplanes, "other bits");
        }
    }
}

/// Rows after a length are zero in results, and what they hold in inputs is of no matter.
#[test]
fn padding_is_not_read() {
    let case = Case { heads: (4, 2), tokens: 80, lengths: vec![65, 0, 17], initial: true, ..Case::default() };
    for causal in [true, false] {
        let case = Case { causal, ..case.clone() };
        let data = case.data();
        let got = computed(&case, &data);
        let mut other = case.data();
        let is_padding = |row: usize| row % case.tokens >= case.lengths[row / case.tokens];
        let (h, (d, dv)) = (case.heads, case.dims);
        for (x, one) in
            [(&mut other.q, h.0 * d), (&mut other.k, h.1 * d), (&mut other.v, h.1 * dv), (&mut other.grad_o, h.0 * dv)]
        {
            x.chunks_exact_mut(one).enumerate().filter(|(i, _)| is_padding(*i)).for_each(|(_, x)| x.fill(1e30));
        }
        let same = computed(&case, &other);
        for (x, y, one) in [
            (&got.o, &same.o, h.0 * dv),
            (&got.dq, &same.dq, h.0 * d),
            (&got.dk, &same.dk, h.1 * d),
            (&got.dv, &same.dv, h.1 * dv),
        ] {
            assert_eq!(x, y);
            assert!(x.chunks_exact(one).enumerate().all(|(i, x)| !is_padding(i) || x.iter().all(|x| *x == 0.0)));
        }
        assert_eq!((&got.last, &got.dinitial, &got.dplanes), (&same.last, &same.dinitial, &same.dplanes));
        // The sequence without tokens keeps its state, and its gradient.
        let s = case.buckets() * h.1;
        assert_eq!(got.last.a[s..2 * s], data.initial.a[s..2 * s]);
        assert_eq!(got.dinitial.a[s..2 * s], data.grad_final.a[s..2 * s]);
    }
}

/// Over 2^24 tokens the state and the outputs stay right, where a sum in f32 stands still. The tokens are one block
/// again and again, so that the reference need hash only that.
#[test]
fn no_drift_over_sixteen_million_tokens() {
    let (block, blocks, tail) = (1 << 16, 257, 64);
    let case =
        Case { heads: (1, 1), hash: (2, 2), dims: (8, 8), tokens: block, lengths: vec![block], ..Case::default() };
    let data = case.data();
    let mut race = case.race_on(&Device::cpu(), &data);
    let s = [1, block, 1, 8];
    let (q, k, v) = (TensorView::f32(&data.q, s), TensorView::f32(&data.k, s), TensorView::f32(&data.v, s));
    let mut state = race.new_state(1).unwrap();
    let mut last: Option<Tensor> = None;
    for _ in 0..blocks {
        last = Some(race.append(&mut state, &q, &k, &v).unwrap());
    }
    assert_eq!(state.tokens(0), Some(blocks as u64 * block as u64));
    let got = race.read_state(&state).unwrap();

    let mut errors = Vec::new();
    case.each_unit(&data, &mut |unit| {
        let mut sum = math::State::zeros(8, 8);
        let mut naive = [0f32; 8];
        let mut phis = Vec::new();
        let mut before = sum.clone();
        for (t, (k, v)) in unit.problem.k.chunks_exact(8).zip(unit.problem.v.chunks_exact(8)).enumerate() {
            if t == block - tail {
                before = sum.clone();
            }
            let phi = math::features(unit.problem.planes, 2, unit.problem.beta, k);
            sum.absorb(&phi, v);
            phis.push(phi.iter().map(|x| *x as f32).collect::<Vec<_>>());
        }
        for _ in 0..blocks {
            phis.iter().for_each(|phi| naive.iter_mut().zip(phi).for_each(|(sum, x)| *sum += x));
        }
        let times = |state: &math::State, n: usize| -> math::State {
            let scale = |x: &Vec<f64>| x.iter().map(|x| x * n as f64).collect();
            math::State { a: scale(&state.a), b: scale(&state.b) }
        };
        let whole = times(&sum, blocks);
        let mut start = times(&sum, blocks - 1);
        start.a.iter_mut().zip(&before.a).for_each(|(x, y)| *x += y);
        start.b.iter_mut().zip(&before.b).for_each(|(x, y)| *x += y);
        let at = (block - tail) * 8;
        let q = vec![&unit.problem.q[0][at..]];
        let problem = math::Problem { q, k: &unit.problem.k[at..], v: &unit.problem.v[at..], ..unit.problem };
        let (o, _) = math::forward(&problem, &start);
        let o_got = wide(last.as_ref().unwrap());
        let naive: Vec<f64> = naive.iter().map(|x| f64::from(*x)).collect();
        errors.extend([
            ("A", error(&got.a, &whole.a)),
            ("B", error(&got.b, &whole.b)),
            ("o", error(&o_got[at..], &o[0])),
            ("A summed in f32", error(&naive, &whole.a)),
        ]);
    });
    println!("errors after {} tokens: {errors:?}", blocks * block);
    // B is a sum of values of both signs, some thousand times smaller than what was summed.
    for ((name, error), bound) in errors[..3].iter().zip([5e-8, 2e-5, 2e-5]) {
        assert!(*error < bound, "{name}: {error}");
    }
    assert!(errors[3].1 > 1e-3, "the tokens are too few to tell: {errors:?}");
}

/// With the flattest hash in use the part of o that depends on the query survives, small as it is.
#[test]
fn the_flat_hash_keeps_what_depends_on_the_query() {
    for normalization in [Normalization::Ratio, Normalization::BucketMean] {
        for causal in [false, true] {
            let case = Case {
                heads: (1, 1),
                hash: (2, 2),
                dims: (128, 128),
                betas: vec![1.0 / 128f32.sqrt()],
                normalization,
                causal,
                tokens: 4096,
                lengths: vec![4096],
                offset: 1.0,
                ..Case::default()
            };
            let data = case.data();
            let (got, want) = (computed(&case, &data), expected(&case, &data));
            // What a flat hash would read: the mean of the values seen.
            let mut mean = vec![0.0; 128];
            let mut flat = Vec::new();
            for (t, v) in data.v.chunks_exact(128).enumerate() {
                mean.iter_mut().zip(v).for_each(|(mean, v)| *mean += (f64::from(*v) - *mean) / (t + 1) as f64);
                flat.extend_from_slice(&mean);
            }
            let flat = if causal { flat } else { mean.repeat(4096) };
            let part = |o: &[f64]| o.iter().zip(&flat).map(|(o, flat)| o - flat).collect::<Vec<_>>();
            let (part_got, part_want) = (part(&got.o), part(&want.o));
            let size = error(&want.o, &flat);
            let off = error(&part_got, &part_want);
            println!("{normalization:?} causal {causal}: part {size:.1e} of o, error {off:.1e} of the part");
            assert!(off < 1e-3, "{normalization:?} causal {causal}: {off}");
            let gradients = (error(&got.dq, &want.dq), error(&got.dk, &want.dk), error(&got.dplanes, &want.dplanes));
            println!("    dq, dk, dplanes: {gradients:?}");
        }
    }
}

/// A saturated hash, whose weights reach below what f32 holds, gives finite numbers.
#[test]
fn a_sharp_hash_stays_finite() {
    for normalization in ALL {
        let case = Case { betas: vec![60.0], hash: (2, 8), normalization, ..Case::default() };
        let data = case.data();
        let got = computed(&case, &data);
        for x in [&got.o, &got.dq, &got.dk, &got.dv, &got.dbeta, &got.dplanes, &got.dinitial.a, &got.dinitial.b] {
            assert!(x.iter().all(|x| x.is_finite()), "{normalization:?}");
        }
    }
}

#[test]
fn memory_that_is_not_there_is_refused() {
    let shape = RaceShape { num_q_heads: 1, num_kv_heads: 1, head_dim: 512, value_dim: 512, dtype: DType::F32 };
    let race = Race::new(&Device::cpu(), softhash::RaceConfig::default(), shape).unwrap();
    for batch in [1 << 40, usize::MAX] {
        assert!(matches!(race.new_state(batch), Err(Error::OutOfMemory { op: "new_state", .. })));
    }
}

/// A refused call leaves the state as it was, and so does one over no tokens.
#[test]
fn refused_calls_change_nothing() {
    let case = Case::default();
    let data = case.data();
    let mut race = case.race_on(&Device::cpu(), &data);
    let x = noise(1, 2 * 64 * 3);
    let mut state = race.new_state(1).unwrap();
    let (q, kv) = (TensorView::f32(&x, [1, 3, 2, 64]), TensorView::f32(&x, [1, 3, 1, 64]));
    race.append(&mut state, &q, &kv, &kv).unwrap();
    let before = race.read_state(&state).unwrap();
    let bad = [f32::NAN; 64 * 3];
    let bad = TensorView::f32(&bad, [1, 3, 1, 64]);
    assert!(matches!(race.append(&mut state, &q, &kv, &bad), Err(Error::NonFinite { .. })));
    let none = TensorView::f32(&[], [1, 0, 1, 64]);
    race.append(&mut state, &TensorView::f32(&[], [1, 0, 2, 64]), &none, &none).unwrap();
    assert_eq!((race.read_state(&state).unwrap(), state.tokens(0)), (before, Some(3)));
}
