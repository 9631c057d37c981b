//! RACE's passes on the tensor cores of a CUDA device against the CPU, and its steps in a graph. Needs
//! `SOFTHASH_TEST_DEVICE=cuda`; without it there is nothing to test.
#![cfg(feature = "cuda")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    #[allow(dead_code, reason = "each test takes what it needs")]
    pub mod race;
}

use common::race::{Case, Data, error, wide};
use softhash::{DType, Device, RaceState, StateGradient};

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
        _ => 3e-5,
    };
    let rounding = match case.output {
        DType::Bf16 => 2.4e-3,
        DType::F16 => 3e-4,
        _ => 0.0,
    };
    match name {
        "o" => operands + rounding,
        "dq" | "dk" | "dplanes" => 2.0 * operands,
        _ => operands,
    }
}

fn wrong(case: &Case, got: &[(&'static str, Vec<f64>)], want: &[(&'static str, Vec<f64>)]) -> Vec<String> {
    let errors = got.iter().zip(want).map(|((name, got), (_, want))| (name, error(got, want)));
    let over = errors.filter(|(name, e)| e.is_nan() || *e > bound(case, name));
    over.map(|(name, e)| format!("{}: {name} is off by {e:.1e}", case.name())).collect()
}

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
                let case = Case { heads, dims, hash, lengths, tokens, dtype, output, betas, ..Case::default() };
                cases.push(Case { initial: beta > 0.5, ..case });
            }
        }
    }
    cases
}

#[test]
fn tensor_cores_give_what_the_cpu_gives() {
    let Some(device) = device() else { return };
    let mut failures = Vec::new();
    for case in cases() {
        let data = case.data();
        let exact = Case { output: DType::F32, ..case.clone() };
        let got = run(&case, &data, &device);
        // The CPU takes the same numbers, o unrounded.
        let want = run(&exact, &data, &Device::cpu());
        failures.extend(wrong(&case, &got, &want));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
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

/// The same bits each time.
#[test]
fn results_do_not_depend_on_chance() {
    let Some(device) = device() else { return };
    for case in cases().into_iter().take(2) {
        let data = case.data();
        assert!(run(&case, &data, &device) == run(&case, &data, &device), "{}", case.name());
    }
}
