//! RACE's passes on the tensor cores of a CUDA device against the CPU and the f64 reference, and its steps in a graph.
//! Needs `SOFTHASH_TEST_DEVICE=cuda`; without it there is nothing to test.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    #[allow(dead_code, reason = "each test takes what it needs")]
    pub mod race;
}

use common::race::{Case, Data, Elements, error, wide};
use softhash::race::reference as math;
use softhash::{DType, Device, Normalization, Race, RaceOptions, RaceState, StateGradient, StateParts, TensorView};
use std::ops::Range;

fn device() -> Option<Device> {
    let name = std::env::var("SOFTHASH_TEST_DEVICE").ok().filter(|name| name.starts_with("cuda"))?;
    Some(Device::by_name(&name).unwrap())
}

/// Everything that a forward and a backward give, by name.
fn run(case: &Case, data: &Data, device: &Device) -> Vec<(&'static str, Vec<f64>)> {
    let mut race = case.race_on(device, data);
    let [q, k, v, g] = case.elements(data);
    let shapes = case.shapes();
    let (q, k) = (q.view(shapes[0]), k.view(shapes[1]));
    let (v, g) = (v.view(shapes[2]), g.view(shapes[3]));
    let state: RaceState = race.write_state(&data.initial, &vec![0; case.batch()]).unwrap();
    let gradient: StateGradient = race.write_state_gradient(&data.grad_final, case.batch()).unwrap();
    let out = race.forward_with(&q, &k, &v, Some(&state), &case.options()).unwrap();
    let last = race.read_state(&out.state).unwrap();
    let found = race.backward(&q, &k, &v, &g, Some(&state), Some(&gradient), &case.options()).unwrap();
    let first = race.read_state_gradient(&found.d_initial_state).unwrap();
    vec![
        ("o", wide(&out.o)),
        ("A", last.a),
        ("B", last.b),
        ("dq", wide(&found.dq)),
        ("dk", wide(&found.dk)),
        ("dv", wide(&found.dv)),
        ("dplanes", wide(&found.d_planes)),
        ("dA", first.a),
        ("dB", first.b),
    ]
}

/// Relative error that operands and outputs of these dtypes may make.
fn bound(case: &Case, name: &str) -> f64 {
    let operands = match (case.dtype, case.output) {
        // In one part, or two of them.
        (DType::Bf16, DType::Bf16) => 4e-3,
        // At the precision of f32.
        (DType::F32, DType::F32) => {
            return match name {
                "A" | "B" => 2e-6,
                "o" | "dv" | "dA" | "dB" => 5e-6,
                _ => 3e-5,
            };
        }
        _ => 3e-5,
    };
    let narrow = if case.gradients == DType::Bf16 { 2.4e-3 } else { 0.0 };
    let rounding = match case.output {
        DType::Bf16 => 2.4e-3,
        DType::F16 => 3e-4,
        _ => 0.0,
    };
    match name {
        "o" => operands + rounding,
        "dq" | "dk" => 2.0 * operands + narrow,
        "dv" => operands + narrow,
        "dplanes" => 2.0 * operands,
        _ => operands,
    }
}

fn wrong(case: &Case, got: &[(&'static str, Vec<f64>)], want: &[(&'static str, Vec<f64>)]) -> Vec<String> {
    let errors = got.iter().zip(want).map(|((name, got), (_, want))| (name, error(got, want)));
    let over = errors.filter(|(name, e)| e.is_nan() || *e > bound(case, name));
    over.map(|(name, e)| format!("{}: {name} is off by {e:.1e}", case.name())).collect()
}

/// Shapes of [`cases`].
const SHAPES: usize = 4;

fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for (heads, dims, hash, lengths) in [
        ((2, 2), (128, 128), (4, 4), vec![700]),
        ((4, 1), (64, 64), (3, 3), vec![130, 0, 333]),
        ((2, 1), (128, 64), (2, 2), vec![64, 65]),
        ((1, 1), (32, 128), (5, 3), vec![200]),
    ] {
        for (dtype, output) in [(DType::Bf16, DType::Bf16), (DType::F16, DType::F16), (DType::Bf16, DType::F32)] {
            for beta in [0.1, 1.0, 4.0] {
                let tokens = lengths.iter().copied().max().unwrap();
                let (lengths, betas) = (lengths.clone(), vec![beta]);
                // In the inputs' type too.
                let gradients = if dtype == DType::Bf16 && beta != 1.0 { output } else { DType::F32 };
                let case =
                    Case { heads, dims, hash, lengths, tokens, dtype, output, gradients, betas, ..Case::default() };
                cases.push(Case { initial: beta > 0.5, ..case });
            }
        }
    }
    cases
}

/// The tensor cores give what the CPU gives, in all cases of one shape: a test each, since their kernels take longer to
/// compile than to run.
fn compare(shape: usize) {
    let Some(device) = device() else { return };
    let mut failures = Vec::new();
    let all = cases();
    assert_eq!(all.len() % SHAPES, 0, "each shape has as many cases");
    for case in all.chunks(all.len() / SHAPES).nth(shape).unwrap() {
        let data = case.data();
        let exact = Case { output: DType::F32, gradients: DType::F32, ..case.clone() };
        let got = run(case, &data, &device);
        // The CPU takes the same numbers, o unrounded.
        let want = run(&exact, &data, &Device::cpu());
        failures.extend(wrong(case, &got, &want));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn four_tables_of_four_planes() {
    compare(0);
}

#[test]
fn groups_and_lengths_of_their_own() {
    compare(1);
}

#[test]
fn keys_wider_than_values() {
    compare(2);
}

#[test]
fn values_wider_than_keys() {
    compare(3);
}

#[test]
fn a_planted_error_is_seen() {
    let Some(device) = device() else { return };
    let case = Case { dims: (128, 128), dtype: DType::Bf16, output: DType::Bf16, ..Case::default() };
    let data = case.data();
    let want = run(&case, &data, &Device::cpu());
    let mut got = run(&case, &data, &device);
    assert_eq!(wrong(&case, &got, &want), Vec::<String>::new());
    got[4].1[0..6400].iter_mut().for_each(|x| *x *= 1.05);
    assert_eq!(wrong(&case, &got, &want).len(), 1);
}

/// Gradients of inputs, hyperplanes, initial state; and what a forward gives, in f64.
fn reference(case: &Case, data: &Data) -> Vec<(&'static str, Vec<f64>)> {
    let ((hq, hkv), (_, width)) = (case.heads, case.dims);
    let group = hq / hkv;
    let [mut dq, mut dk, mut dv, mut o] = case.shapes().map(|shape| vec![0.0; shape.iter().product()]);
    let (mut a, mut b, mut da, mut db) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let mut planes = vec![0.0; data.planes.len()];
    case.each_unit(data, &mut |unit| {
        let (batch, head) = (unit.batch, unit.kv_head);
        let (outputs, last) = math::forward(&unit.problem, &unit.initial);
        let rows: Vec<_> = (0..group).map(|i| case.rows(&data.grad_o, batch, hq, head * group + i, width)).collect();
        let rows: Vec<&[f64]> = rows.iter().map(Vec::as_slice).collect();
        let after = case.state(&data.grad_final, batch, head, unit.ensemble);
        let found = math::backward(&unit.problem, &unit.initial, &rows, &after);
        for (i, (of_query, output)) in found.dq.iter().zip(&outputs).enumerate() {
            case.add_rows(&mut o, batch, hq, head * group + i, output, 1.0);
            case.add_rows(&mut dq, batch, hq, head * group + i, of_query, 1.0);
        }
        case.add_rows(&mut dk, batch, hkv, head, &found.dk, 1.0);
        case.add_rows(&mut dv, batch, hkv, head, &found.dv, 1.0);
        a.extend(last.a);
        b.extend(last.b);
        da.extend(found.dinitial.a);
        db.extend(found.dinitial.b);
        planes.iter_mut().zip(&found.dplanes).for_each(|(sum, x)| *sum += x);
    });
    let named = [("o", o), ("A", a), ("B", b), ("dq", dq), ("dk", dk), ("dv", dv), ("dplanes", planes)];
    named.into_iter().chain([("dA", da), ("dB", db)]).collect()
}

/// f32 inputs, and a bucket normalisation, against the f64 reference.
fn judge(cases: impl IntoIterator<Item = Case>) {
    let Some(device) = device() else { return };
    let mut failures = Vec::new();
    for case in cases {
        let data = case.data();
        failures.extend(wrong(&case, &run(&case, &data, &device), &reference(&case, &data)));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

fn of_any_length(normalization: Normalization) {
    judge([1, 2, 63, 65, 100, 2047].map(|tokens| {
        let (heads, hash) = if tokens == 2047 { ((1, 1), (3, 3)) } else { ((2, 1), (4, 4)) };
        Case { normalization, heads, hash, tokens, lengths: vec![tokens], initial: true, ..Case::default() }
    }));
}

#[test]
fn f32_of_any_length() {
    of_any_length(Normalization::Ratio);
}

#[test]
fn bucket_means_of_any_length() {
    of_any_length(Normalization::BucketMean);
}

/// Heads, widths, tables and planes, β.
type Shape = ((usize, usize), (usize, usize), (usize, usize), f32);

/// Both normalisations over some shapes.
fn of_any_shape(shapes: [Shape; 2]) {
    judge(shapes.into_iter().flat_map(|(heads, dims, hash, beta)| {
        [Normalization::Ratio, Normalization::BucketMean].map(|normalization| {
            let lengths = vec![150, 0, 77];
            let case = Case { heads, dims, hash, normalization, tokens: 150, lengths, ..Case::default() };
            Case { initial: true, betas: vec![beta], ..case }
        })
    }));
}

#[test]
fn f32_of_64_and_80_channels() {
    of_any_shape([((1, 1), (64, 64), (2, 2), 0.1), ((4, 1), (80, 80), (3, 3), 1.0)]);
}

#[test]
fn f32_of_96_and_128_channels() {
    of_any_shape([((8, 1), (96, 96), (4, 4), 1.0), ((1, 1), (128, 128), (4, 4), 4.0)]);
}

#[test]
fn f32_of_256_channels_and_of_few() {
    of_any_shape([((2, 2), (256, 256), (2, 2), 1.0), ((1, 1), (24, 40), (9, 4), 1.0)]);
}

/// More buckets, bits and channels than a tile has.
#[test]
fn f32_of_several_tiles() {
    of_any_shape([((2, 1), (33, 130), (3, 7), 1.0), ((2, 1), (130, 33), (60, 2), 0.1)]);
}

#[test]
fn a_planted_error_in_f32_is_seen() {
    let Some(device) = device() else { return };
    let case = Case { tokens: 100, lengths: vec![100], normalization: Normalization::BucketMean, ..Case::default() };
    let data = case.data();
    let want = reference(&case, &data);
    let got = run(&case, &data, &device);
    assert_eq!(wrong(&case, &got, &want), Vec::<String>::new());
    for result in 0..got.len() {
        // What operands of one part alone would make of it: some 2⁻¹².
        let mut got = got.clone();
        got[result].1.iter_mut().step_by(2).for_each(|x| *x *= 1.0 + 2e-4);
        assert_eq!(wrong(&case, &got, &want).len(), 1, "{}", got[result].0);
    }
}

/// Steps that are replays of one are those that were not captured, bit for bit, past the number of tokens that wait
/// beside a state's sums; and the states are those of the CPU.
#[test]
fn steps_are_captured_and_replayed() {
    let Some(device) = device() else { return };
    let (_, stream) = device.as_cuda().unwrap();
    for (heads, normalization) in [((4, 2), Normalization::Ratio), ((3, 1), Normalization::BucketMean)] {
        let (tokens, batch) = (37, 2);
        let (dtype, lengths) = (DType::Bf16, vec![tokens; batch]);
        let case =
            Case { heads, normalization, dtype, output: dtype, tokens, lengths, initial: true, ..Case::default() };
        let data = case.data();
        let rows = [(&data.q, heads.0), (&data.k, heads.1), (&data.v, heads.1)].map(|(x, heads)| (x, heads * 64));
        let token = |at: usize| {
            rows.map(|(x, row)| -> Vec<u16> {
                let of = |b: usize| x[(b * tokens + at) * row..][..row].iter();
                (0..batch).flat_map(of).map(|x| half::bf16::from_f32(*x).to_bits()).collect()
            })
        };
        let mut race = case.race_on(&device, &data);
        let mut eager = race.write_state(&data.initial, &vec![0; batch]).unwrap();
        let mut replayed = race.fork(&eager).unwrap();
        let mut slices = token(0).map(|x| stream.clone_htod(&x).unwrap());
        fn views<'a>(
            slices: &'a [softhash::cudarc::driver::CudaSlice<u16>; 3],
            heads: (usize, usize),
            batch: usize,
        ) -> [TensorView<'a>; 3] {
            let view = |at: usize, heads| TensorView::cuda_slice(&slices[at], 0, DType::Bf16, [batch, 1, heads, 64]);
            [view(0, heads.0), view(1, heads.1), view(2, heads.1)]
        }
        let [q, k, v] = views(&slices, heads, batch);
        let (mut graph, o) = device.capture(|| race.append(&mut replayed, &q, &k, &v)).unwrap();
        let mut all = Vec::new();
        for at in 0..tokens {
            for (slice, x) in slices.iter_mut().zip(token(at)) {
                stream.memcpy_htod(&x, slice).unwrap();
            }
            let [q, k, v] = views(&slices, heads, batch);
            let want = race.append(&mut eager, &q, &k, &v).unwrap().read_blocking().unwrap().bytes().to_vec();
            graph.launch().unwrap();
            assert!(o.read_blocking().unwrap().bytes() == want, "{heads:?} {normalization:?}: token {at}");
            all.push(want);
        }
        let [eager, replayed] = [&eager, &replayed].map(|state| race.read_state(state).unwrap());
        assert!(eager.a == replayed.a && eager.b == replayed.b);
        let exact = Case { output: DType::F32, ..case.clone() };
        let mut cpu = exact.race_on(&Device::cpu(), &data);
        let start = cpu.write_state(&data.initial, &vec![0; batch]).unwrap();
        let [q, k, v, _] = exact.elements(&data);
        let shapes = exact.shapes();
        let views = (q.view(shapes[0]), k.view(shapes[1]), v.view(shapes[2]));
        let want = cpu.forward_with(&views.0, &views.1, &views.2, Some(&start), &exact.options()).unwrap();
        let last = cpu.read_state(&want.state).unwrap();
        assert!(error(&replayed.a, &last.a) < 1e-6 && error(&replayed.b, &last.b) < 1e-6);
        let row = heads.0 * 64;
        let mut got = vec![0.0; batch * tokens * row];
        for (at, o) in all.iter().enumerate() {
            for (b, o) in o.chunks_exact(row * 2).enumerate() {
                let of_token = o.chunks_exact(2).map(|x| half::bf16::from_le_bytes([x[0], x[1]]).to_f64());
                got[(b * tokens + at) * row..][..row].iter_mut().zip(of_token).for_each(|(to, x)| *to = x);
            }
        }
        let off = error(&got, &wide(&want.o));
        assert!(off < 2.4e-3, "{heads:?} {normalization:?}: o is off by {off:.1e}");
    }
}

/// `race` takes in some tokens of the one sequence in one call: what it gives for them.
fn feed(race: &mut Race, case: &Case, data: &Data, state: &mut RaceState, tokens: Range<usize>) -> Vec<f64> {
    let rows = [(&data.q, case.heads.0, case.dims.0), (&data.k, case.heads.1, case.dims.0)];
    let [q, k, v] = [rows[0], rows[1], (&data.v, case.heads.1, case.dims.1)].map(|(x, heads, dim)| {
        let of = Elements::new(case.dtype, &x[tokens.start * heads * dim..tokens.end * heads * dim]);
        (of, [1, tokens.len(), heads, dim])
    });
    let [q, k, v] = [&q, &k, &v].map(|(x, shape)| x.view(*shape));
    let options = RaceOptions { output: Some(case.output), ..RaceOptions::default() };
    wide(&race.append_with(state, &q, &k, &v, &options).unwrap())
}

/// Tokens that wait beside a state's sums are part of it: forks take them along, what is read has them in it, going on
/// from a fork is going back to it, and a prompt comes after them.
#[test]
fn tokens_that_wait_are_part_of_the_state() {
    let Some(device) = device() else { return };
    for (dtype, hash, ensembles, normalization) in [
        (DType::F32, (4, 4), 1, Normalization::Ratio),
        (DType::Bf16, (2, 2), 1, Normalization::Ratio),
        // Of so many bits eight wait at most.
        (DType::F32, (10, 7), 2, Normalization::BucketMean),
    ] {
        let (tokens, prompt) = (120, 70);
        let lengths = vec![tokens];
        let case = Case { dtype, hash, ensembles, normalization, tokens, lengths, initial: true, ..Case::default() };
        let data = case.data();
        let (mut race, mut cpu) = (case.race_on(&device, &data), case.race_on(&Device::cpu(), &data));
        let mut state = race.write_state(&data.initial, &[0]).unwrap();
        let mut exact = cpu.write_state(&data.initial, &[0]).unwrap();
        let near = |what: &str, got: &[f64], want: &[f64], bound: f64| {
            let off = error(got, want);
            assert!(off < bound, "{}: {what} is off by {off:.1e}", case.name());
        };
        let same = |what: &str, got: &StateParts, want: &StateParts, bound: f64| {
            near(&format!("{what}, A"), &got.a, &want.a, bound);
            near(&format!("{what}, B"), &got.b, &want.b, bound);
        };
        for seen in 0..34 {
            if [0, 1, 5, 7, 8, 14, 15, 16, 17, 31, 32].contains(&seen) {
                let known = cpu.read_state(&exact).unwrap();
                let [read, mut again, mut long] = [(); 3].map(|()| race.fork(&state).unwrap());
                let read_first = race.read_state(&read).unwrap();
                same(&format!("a fork of {seen} tokens"), &read_first, &known, 1e-6);
                assert!(race.read_state(&read).unwrap() == read_first, "reading adds what waits once");

                // Steps of a fork are those of the state, bit for bit, and of a fork whose tokens were added a little else.
                let (mut ahead, mut added) = (race.fork(&again).unwrap(), read);
                for at in seen..seen + 3 {
                    let first = feed(&mut race, &case, &data, &mut ahead, at..at + 1);
                    assert!(feed(&mut race, &case, &data, &mut again, at..at + 1) == first, "{seen} tokens, then {at}");
                    let third = feed(&mut race, &case, &data, &mut added, at..at + 1);
                    near("a step after reading", &third, &first, 1e-6);
                }
                assert!(race.read_state(&ahead).unwrap() == race.read_state(&again).unwrap());

                let mut exact_long = cpu.fork(&exact).unwrap();
                let got = feed(&mut race, &case, &data, &mut long, seen..seen + prompt);
                let want = feed(&mut cpu, &case, &data, &mut exact_long, seen..seen + prompt);
                near(&format!("a prompt after {seen} tokens"), &got, &want, bound(&case, "o"));
                let (got, want) = (race.read_state(&long).unwrap(), cpu.read_state(&exact_long).unwrap());
                same(&format!("a state of a prompt after {seen} tokens"), &got, &want, bound(&case, "A"));
                assert_eq!((state.tokens(0), long.tokens(0)), (Some(seen as u64), Some((seen + prompt) as u64)));
            }
            // What became of the forks does not concern the state.
            let got = feed(&mut race, &case, &data, &mut state, seen..seen + 1);
            let want = feed(&mut cpu, &case, &data, &mut exact, seen..seen + 1);
            near(&format!("token {seen}"), &got, &want, 3e-6);
        }
    }
}

/// The same bits each time.
#[test]
fn results_do_not_depend_on_chance() {
    let Some(device) = device() else { return };
    for case in cases().into_iter().take(2) {
        let data = case.data();
        assert!(run(&case, &data, &device) == run(&case, &data, &device), "{}", case.name());
    }
}
