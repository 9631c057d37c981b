//! RACE's backward on a GPU against the f64 reference.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    pub mod device;
    #[allow(dead_code, reason = "each test takes what it needs")]
    pub mod race;
}

use common::device::gpu;
use common::race::{ALL, Case, Data, error, wide};
use softhash::race::reference as math;
use softhash::{DType, Device, Normalization, Race, RaceGradients, RaceOptions, RaceState, StateGradient, StateParts};
use std::ops::Range;
use std::sync::OnceLock;

/// One device for all tests, so that each kernel is compiled once.
fn device() -> &'static Device {
    static DEVICE: OnceLock<Device> = OnceLock::new();
    DEVICE.get_or_init(gpu)
}

#[derive(Default)]
struct Gradients {
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    dplanes: Vec<f64>,
    dbeta: Vec<f64>,
    da: Vec<f64>,
    db: Vec<f64>,
}

impl Gradients {
    fn read(race: &Race, g: &RaceGradients) -> Self {
        let StateParts { a, b, .. } = race.read_state_gradient(&g.d_initial_state).unwrap();
        Self {
            dq: wide(&g.dq),
            dk: wide(&g.dk),
            dv: wide(&g.dv),
            dplanes: wide(&g.d_planes),
            dbeta: wide(&g.d_beta),
            da: a,
            db: b,
        }
    }

    /// Errors over their bounds, each with its name.
    fn errors(&self, want: &Self) -> Vec<(&'static str, f64, f64)> {
        let all = [
            ("dq", &self.dq, &want.dq, 3e-5),
            ("dk", &self.dk, &want.dk, 3e-5),
            ("dv", &self.dv, &want.dv, 5e-6),
            ("dplanes", &self.dplanes, &want.dplanes, 3e-5),
            ("dbeta", &self.dbeta, &want.dbeta, 1e-4),
            ("dA", &self.da, &want.da, 5e-6),
            ("dB", &self.db, &want.db, 5e-6),
        ];
        let norm = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        // One number, in which what the planes' gradients are made of may cancel by chance.
        let floor = 0.01 * norm(&want.dplanes) / norm(&want.dbeta).max(1e-300);
        let scale = |name| if name == "dbeta" { floor.max(1.0) } else { 1.0 };
        all.into_iter().map(|(name, got, want, bound)| (name, error(got, want) / scale(name), bound)).collect()
    }

    fn judge(&self, want: &Self, name: &str) {
        let errors = self.errors(want);
        let line = |(what, e, bound): &(_, f64, f64)| format!("{what} {e:.1e} of {bound:.0e}");
        println!("{name}: {}", errors.iter().map(line).collect::<Vec<_>>().join(", "));
        let within = |(_, e, bound): &(_, f64, f64)| e <= bound;
        assert!(errors.iter().all(within), "{name}: {:?}", errors.iter().map(line).collect::<Vec<_>>());
    }
}

fn reference(case: &Case, data: &Data) -> Gradients {
    let ((hq, hkv), (d, dv)) = (case.heads, case.dims);
    let group = hq / hkv;
    let sets = if case.per_head { hkv } else { 1 };
    let rows = case.batch() * case.tokens;
    let mut out = Gradients {
        dq: vec![0.0; rows * hq * d],
        dk: vec![0.0; rows * hkv * d],
        dv: vec![0.0; rows * hkv * dv],
        dplanes: vec![0.0; sets * case.ensembles * case.bits() * d],
        dbeta: vec![0.0; case.betas.len()],
        ..Gradients::default()
    };
    case.each_unit(data, &mut |unit| {
        let (b, h) = (unit.batch, unit.kv_head);
        let grads: Vec<Vec<f64>> = (0..group)
            .map(|g| case.rows(&data.grad_o, b, hq, h * group + g, dv))
            .map(|rows| rows.into_iter().map(|x| x / case.ensembles as f64).collect())
            .collect();
        let grads: Vec<&[f64]> = grads.iter().map(Vec::as_slice).collect();
        let grad_final = case.state(&data.grad_final, b, h, unit.ensemble);
        let found = math::backward(&unit.problem, &unit.initial, &grads, &grad_final);
        for (g, rows) in found.dq.iter().enumerate() {
            case.add_rows(&mut out.dq, b, hq, h * group + g, rows, 1.0);
        }
        case.add_rows(&mut out.dk, b, hkv, h, &found.dk, 1.0);
        case.add_rows(&mut out.dv, b, hkv, h, &found.dv, 1.0);
        out.dbeta[h % case.betas.len()] += found.dbeta;
        let at = (h % sets * case.ensembles + unit.ensemble) * found.dplanes.len();
        let sums = out.dplanes[at..].iter_mut();
        sums.zip(&found.dplanes).for_each(|(sum, x)| *sum += x);
        out.da.extend(found.dinitial.a);
        out.db.extend(found.dinitial.b);
    });
    out
}

/// What a backward begins with: the state, and the gradient of the one at the end.
fn ends(case: &Case, race: &Race, data: &Data) -> (RaceState, StateGradient) {
    let state = race.write_state(&data.initial, &vec![0; case.batch()]).unwrap();
    (state, race.write_state_gradient(&data.grad_final, case.batch()).unwrap())
}

fn backward(case: &Case, data: &Data) -> Gradients {
    let mut race = case.race_on(device(), data);
    let [q, k, v, g] = case.elements(data);
    let shapes = case.shapes();
    let (state, gradient) = ends(case, &race, data);
    let (initial, grad_final) = if case.initial { (Some(&state), Some(&gradient)) } else { (None, None) };
    let (q, k) = (q.view(shapes[0]), k.view(shapes[1]));
    let (v, g) = (v.view(shapes[2]), g.view(shapes[3]));
    let found = race.backward(&q, &k, &v, &g, initial, grad_final, &case.options()).unwrap();
    assert_eq!(found.dq.shape(), shapes[0]);
    assert_eq!(found.dk.shape(), shapes[1]);
    assert_eq!(found.dv.shape(), shapes[2]);
    assert_eq!(found.d_beta.shape(), [case.betas.len()]);
    // What the call was given is as it was.
    assert_eq!(race.read_state_gradient(&gradient).unwrap().a.len(), data.grad_final.a.len());
    assert!(error(&race.read_state_gradient(&gradient).unwrap().b, &data.grad_final.b) < 1e-14);
    assert!(error(&race.read_state(&state).unwrap().b, &data.initial.b) < 1e-14);
    let found = Gradients::read(&race, &found);
    for (x, shape) in [(&found.dq, shapes[0]), (&found.dk, shapes[1]), (&found.dv, shapes[2])] {
        let row = shape[2] * shape[3];
        for (b, &length) in case.lengths.iter().enumerate() {
            let padding = (b * case.tokens + length) * row..(b + 1) * case.tokens * row;
            assert!(x[padding].iter().all(|&x| x == 0.0), "{}: padding of sequence {b}", case.name());
        }
    }
    found
}

fn judge(case: &Case) {
    let data = case.data();
    backward(case, &data).judge(&reference(case, &data), &case.name());
}

#[test]
fn any_length() {
    for normalization in ALL {
        for tokens in [1, 2, 33, 65, 100] {
            // One token alone is read whatever its hash: it takes a state for gradients to be.
            let initial = tokens < 3 || tokens == 65;
            let case = Case { normalization, tokens, lengths: vec![tokens], initial, ..Case::default() };
            judge(&Case { dims: (64, 80), ..case });
        }
    }
}

#[test]
fn any_sharpness_causal_or_not_with_a_state_or_without() {
    for normalization in ALL {
        for causal in [true, false] {
            for initial in [true, false] {
                for beta in [0.1, 1.0, 4.0] {
                    let case = Case { normalization, causal, initial, betas: vec![beta], ..Case::default() };
                    judge(&Case {
                        heads: (4, 2),
                        dims: (16, 12),
                        tokens: 100,
                        lengths: vec![100],
                        hash: (3, 3),
                        ..case
                    });
                }
            }
        }
    }
}

#[test]
fn any_shape() {
    for (i, (heads, dims, hash)) in [
        ((4, 1), (80, 64), (4, 4)),
        ((4, 4), (24, 40), (1, 1)),
        ((8, 2), (64, 80), (5, 3)),
        ((3, 1), (5, 7), (2, 6)),
        ((2, 1), (16, 140), (1, 8)),
        ((2, 2), (17, 1), (20, 2)),
    ]
    .into_iter()
    .enumerate()
    {
        // Kernels take long to compile here: half of the combinations, in turns.
        for (normalization, odd) in [(Normalization::Ratio, 0), (Normalization::BucketMean, 1)] {
            let case = Case { heads, dims, hash, normalization, causal: i % 2 == odd, ..Case::default() };
            judge(&Case { tokens: 70, lengths: vec![70, 0, 33, 64], ..case });
        }
    }
}

#[test]
fn ensembles_and_parameters_of_each_head() {
    for normalization in ALL {
        for (per_head, betas) in [(true, vec![0.2, 3.0]), (true, vec![1.0]), (false, vec![0.2, 3.0])] {
            let case = Case { ensembles: 2, normalization, per_head, betas, hash: (2, 3), ..Case::default() };
            let causal = case.betas.len() > 1 && case.per_head;
            judge(&Case { heads: (8, 2), dims: (32, 36), initial: true, causal, ..case });
        }
    }
}

#[test]
fn any_dtype() {
    for (dtype, output, causal) in [
        (DType::F16, DType::F16, true),
        (DType::F16, DType::F32, false),
        (DType::Bf16, DType::Bf16, false),
        (DType::Bf16, DType::F32, true),
    ] {
        let case = Case { dtype, output, causal, dims: (64, 72), hash: (2, 2), ..Case::default() };
        judge(&Case { tokens: 67, lengths: vec![3, 67], ..case });
    }
}

/// Tokens of a range.
fn part(case: &Case, data: &Data, tokens: &Range<usize>) -> (Case, Data) {
    let cut = |x: &[f32], heads: usize, dim: usize| -> Vec<f32> {
        let row = heads * dim;
        let at = |b: usize| (b * case.tokens + tokens.start) * row;
        (0..case.batch()).flat_map(|b| &x[at(b)..at(b) + tokens.len() * row]).copied().collect()
    };
    let ((hq, hkv), (d, dv)) = (case.heads, case.dims);
    let data = Data {
        q: cut(&data.q, hq, d),
        k: cut(&data.k, hkv, d),
        v: cut(&data.v, hkv, dv),
        grad_o: cut(&data.grad_o, hq, dv),
        planes: data.planes.clone(),
        initial: data.initial.clone(),
        grad_final: data.grad_final.clone(),
    };
    let lengths = vec![tokens.len(); case.batch()];
    (Case { tokens: tokens.len(), lengths, ..case.clone() }, data)
}

/// Backward of the second part, then of the first with the gradient of the state between.
#[test]
fn two_segments_are_the_whole() {
    for normalization in ALL {
        let case = Case { heads: (4, 2), dims: (16, 12), normalization, initial: true, ..Case::default() };
        let case = Case { tokens: 90, lengths: vec![90; 2], hash: (3, 3), betas: vec![0.3, 2.0], ..case };
        let data = case.data();
        let want = reference(&case, &data);
        let mut race = case.race_on(device(), &data);
        let (first_state, last_gradient) = ends(&case, &race, &data);
        let cut = 37;
        let (first, second) = (part(&case, &data, &(0..cut)), part(&case, &data, &(cut..case.tokens)));
        let options = RaceOptions::default();
        let mut state = race.fork(&first_state).unwrap();
        let [q, k, v, _] = first.0.elements(&first.1);
        let shapes = first.0.shapes();
        race.append(&mut state, &q.view(shapes[0]), &k.view(shapes[1]), &v.view(shapes[2])).unwrap();
        let mut run = |(case, data): &(Case, Data), state: &RaceState, gradient: &StateGradient| {
            let [q, k, v, g] = case.elements(data);
            let s = case.shapes();
            let (q, k, v, g) = (q.view(s[0]), k.view(s[1]), v.view(s[2]), g.view(s[3]));
            race.backward(&q, &k, &v, &g, Some(state), Some(gradient), &options).unwrap()
        };
        let of_second = run(&second, &state, &last_gradient);
        let of_first = run(&first, &first_state, &of_second.d_initial_state);
        let (a, b) = (Gradients::read(&race, &of_first), Gradients::read(&race, &of_second));
        let joined = |a: &[f64], b: &[f64]| -> Vec<f64> {
            let (a, b) = (a.chunks_exact(a.len() / 2), b.chunks_exact(b.len() / 2));
            a.zip(b).flat_map(|(a, b)| [a, b].concat()).collect()
        };
        let sum = |a: &[f64], b: &[f64]| -> Vec<f64> { a.iter().zip(b).map(|(a, b)| a + b).collect() };
        let whole = Gradients {
            dq: joined(&a.dq, &b.dq),
            dk: joined(&a.dk, &b.dk),
            dv: joined(&a.dv, &b.dv),
            dplanes: sum(&a.dplanes, &b.dplanes),
            dbeta: sum(&a.dbeta, &b.dbeta),
            da: a.da,
            db: a.db,
        };
        whole.judge(&want, &format!("two segments, {normalization:?}"));
    }
}

/// With a flat hash the gradients of q and k are small parts of large sums.
#[test]
fn flat_hashes_keep_their_gradients() {
    for normalization in ALL {
        let betas = vec![(1.0 / 64f64.sqrt()) as f32];
        let case = Case { normalization, betas, hash: (2, 2), offset: 3.0, ..Case::default() };
        judge(&Case { heads: (1, 1), dims: (64, 16), tokens: 500, lengths: vec![500], ..case });
    }
}

/// The judge sees an error as small as a hundredth in one row.
#[test]
fn a_planted_error_is_seen() {
    let case = Case::default();
    let data = case.data();
    let want = reference(&case, &data);
    let mut got = backward(&case, &data);
    got.judge(&want, "unharmed");
    got.dk[17 * 64..18 * 64].iter_mut().for_each(|x| *x *= 1.01);
    got.db[5] += 1e-3;
    let red: Vec<_> = got.errors(&want).into_iter().filter(|(_, e, bound)| e > bound).map(|(name, ..)| name).collect();
    assert_eq!(red, ["dk", "dB"]);
}
