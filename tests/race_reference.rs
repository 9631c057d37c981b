//! The f64 reference of RACE against its own definition: finite differences, invariants, other ways to the same numbers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use softhash::Normalization;
use softhash::race::reference::{
    Gradients, Problem, State, Window, backward, features, features_backward, forward, mix, mix_backward,
    window_backward, window_forward,
};

const TABLES: usize = 2;
const PLANES: usize = 2;
const DIM: usize = 5;
const VALUE_DIM: usize = 3;
const TOKENS: usize = 6;
const HEADS: usize = 2;

fn numbers(seed: u64, n: usize) -> Vec<f64> {
    let mut x = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).max(1);
    let mut next = || {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        (x >> 11) as f64 / (1u64 << 53) as f64 * 2.0 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// Everything that a loss depends on, in one place so that each number can be nudged.
#[derive(Clone)]
struct Inputs {
    normalization: Normalization,
    causal: bool,
    planes: Vec<f64>,
    beta: f64,
    q: Vec<Vec<f64>>,
    k: Vec<f64>,
    v: Vec<f64>,
    initial: State,
}

impl Inputs {
    fn new(normalization: Normalization, causal: bool) -> Self {
        let buckets = TABLES << PLANES;
        Self {
            normalization,
            causal,
            planes: numbers(1, TABLES * PLANES * DIM),
            beta: 1.3,
            q: (0..HEADS).map(|h| numbers(2 + h as u64, TOKENS * DIM)).collect(),
            k: numbers(5, TOKENS * DIM),
            v: numbers(6, TOKENS * VALUE_DIM),
            initial: State {
                a: numbers(7, buckets).iter().map(|x| 1.5 + x).collect(),
                b: numbers(8, buckets * VALUE_DIM),
            },
        }
    }

    fn problem(&self) -> Problem<'_> {
        Problem {
            tables: TABLES,
            planes_per_table: PLANES,
            planes: &self.planes,
            beta: self.beta,
            normalization: self.normalization,
            epsilon: if self.normalization == Normalization::Ratio { 0.0 } else { Normalization::EPSILON },
            causal: self.causal,
            head_dim: DIM,
            value_dim: VALUE_DIM,
            q: self.q.iter().map(Vec::as_slice).collect(),
            k: &self.k,
            v: &self.v,
        }
    }

    /// Σ weights·o + Σ weights·(final state).
    fn loss(&self, grad_o: &[Vec<f64>], grad_final: &State) -> f64 {
        let (o, last) = forward(&self.problem(), &self.initial);
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let outputs: f64 = o.iter().zip(grad_o).map(|(o, g)| dot(o, g)).sum();
        outputs + dot(&last.a, &grad_final.a) + dot(&last.b, &grad_final.b)
    }
}

/// Compares a gradient with central differences over every element that `at` reaches.
fn check(
    what: &str,
    inputs: &Inputs,
    grads: (&[Vec<f64>], &State),
    gradient: &[f64],
    at: impl Fn(&mut Inputs, usize) -> &mut f64,
) {
    let step = 1e-5;
    let scale = gradient.iter().map(|g| g.abs()).fold(1e-3, f64::max);
    for (i, gradient) in gradient.iter().enumerate() {
        let nudged = |by: f64| {
            let mut inputs = inputs.clone();
            *at(&mut inputs, i) += by;
            inputs.loss(grads.0, grads.1)
        };
        let difference = (nudged(step) - nudged(-step)) / (2.0 * step);
        let error = (difference - gradient).abs() / scale;
        assert!(error < 1e-8, "{what}[{i}]: {gradient} against {difference}, {:?}", inputs.normalization);
    }
}

const ALL: [(Normalization, bool); 6] = [
    (Normalization::Ratio, true),
    (Normalization::Ratio, false),
    (Normalization::BucketMean, true),
    (Normalization::BucketMean, false),
    (Normalization::BucketSum, true),
    (Normalization::BucketSum, false),
];

#[test]
fn every_gradient_is_a_limit_of_differences() {
    for (normalization, causal) in ALL {
        let inputs = Inputs::new(normalization, causal);
        let buckets = TABLES << PLANES;
        let grad_o: Vec<Vec<f64>> = (0..HEADS).map(|h| numbers(20 + h as u64, TOKENS * VALUE_DIM)).collect();
        let grad_final = State { a: numbers(30, buckets), b: numbers(31, buckets * VALUE_DIM) };
        let views: Vec<&[f64]> = grad_o.iter().map(Vec::as_slice).collect();
        let Gradients { dq, dk, dv, dplanes, dbeta, dinitial } =
            backward(&inputs.problem(), &inputs.initial, &views, &grad_final);
        let grads = (grad_o.as_slice(), &grad_final);
        for (h, dq) in dq.iter().enumerate() {
            check("dq", &inputs, grads, dq, |x, i| &mut x.q[h][i]);
        }
        check("dk", &inputs, grads, &dk, |x, i| &mut x.k[i]);
        check("dv", &inputs, grads, &dv, |x, i| &mut x.v[i]);
        check("dplanes", &inputs, grads, &dplanes, |x, i| &mut x.planes[i]);
        check("dbeta", &inputs, grads, &[dbeta], |x, _| &mut x.beta);
        check("dA", &inputs, grads, &dinitial.a, |x, i| &mut x.initial.a[i]);
        check("dB", &inputs, grads, &dinitial.b, |x, i| &mut x.initial.b[i]);
    }
}

#[test]
fn a_wrong_gradient_is_found() {
    let inputs = Inputs::new(Normalization::Ratio, true);
    let grad_o: Vec<Vec<f64>> = (0..HEADS).map(|h| numbers(20 + h as u64, TOKENS * VALUE_DIM)).collect();
    let none = State::zeros(TABLES << PLANES, VALUE_DIM);
    let views: Vec<&[f64]> = grad_o.iter().map(Vec::as_slice).collect();
    let mut out = backward(&inputs.problem(), &inputs.initial, &views, &none);
    out.dv[4] += 1e-6;
    let caught = std::panic::catch_unwind(|| {
        check("dv", &inputs, (&grad_o, &none), &out.dv, |x, i| &mut x.v[i]);
    });
    assert!(caught.is_err(), "an error of 1e-6 passed");
}

#[test]
fn the_hash_has_its_derivative() {
    let (planes, x) = (numbers(1, TABLES * PLANES * DIM), numbers(2, DIM));
    let weights = numbers(3, TABLES << PLANES);
    let loss = |planes: &[f64], beta: f64, x: &[f64]| -> f64 {
        features(planes, PLANES, beta, x).iter().zip(&weights).map(|(a, b)| a * b).sum()
    };
    let out = features_backward(&planes, PLANES, 0.8, &x, &weights);
    let step = 1e-6;
    for i in 0..DIM {
        let nudged = |by: f64| {
            let mut x = x.clone();
            x[i] += by;
            loss(&planes, 0.8, &x)
        };
        assert!(((nudged(step) - nudged(-step)) / (2.0 * step) - out.dx[i]).abs() < 1e-9);
    }
    for i in 0..planes.len() {
        let nudged = |by: f64| {
            let mut planes = planes.clone();
            planes[i] += by;
            loss(&planes, 0.8, &x)
        };
        assert!(((nudged(step) - nudged(-step)) / (2.0 * step) - out.dplanes[i]).abs() < 1e-9);
    }
    let by_beta = (loss(&planes, 0.8 + step, &x) - loss(&planes, 0.8 - step, &x)) / (2.0 * step);
    assert!((by_beta - out.dbeta).abs() < 1e-9);
}

/// Ratio is a convex combination of values, and so is the mean over buckets but for ε.
#[test]
fn outputs_are_averages_of_values() {
    for (normalization, causal) in ALL {
        let mut inputs = Inputs::new(normalization, causal);
        inputs.initial = State::zeros(TABLES << PLANES, VALUE_DIM);
        inputs.v = vec![2.5; TOKENS * VALUE_DIM];
        let (o, last) = forward(&inputs.problem(), &inputs.initial);
        let expected = if normalization == Normalization::BucketSum { 2.5 * TABLES as f64 } else { 2.5 };
        for o in o.iter().flatten() {
            assert!((o / expected - 1.0).abs() < 2e-5, "{normalization:?}: {o}");
        }
        // The masses of a table add up to the tokens, its sums to the sum of the values.
        for table in last.a.chunks(1 << PLANES) {
            assert!((table.iter().sum::<f64>() - TOKENS as f64).abs() < 1e-12);
        }
    }
}

#[test]
fn any_split_equals_the_whole() {
    for normalization in [Normalization::Ratio, Normalization::BucketMean] {
        let inputs = Inputs::new(normalization, true);
        let (whole, last) = forward(&inputs.problem(), &inputs.initial);
        for cut in 0..=TOKENS {
            let part = |from: usize, to: usize| Inputs {
                q: inputs.q.iter().map(|q| q[from * DIM..to * DIM].to_vec()).collect(),
                k: inputs.k[from * DIM..to * DIM].to_vec(),
                v: inputs.v[from * VALUE_DIM..to * VALUE_DIM].to_vec(),
                ..inputs.clone()
            };
            let (first, rest) = (part(0, cut), part(cut, TOKENS));
            let (o1, between) = forward(&first.problem(), &inputs.initial);
            let (o2, end) = forward(&rest.problem(), &between);
            for h in 0..HEADS {
                assert_eq!([o1[h].clone(), o2[h].clone()].concat(), whole[h]);
            }
            assert_eq!(end, last);
        }
    }
}

/// Two published forms of the same sum.
#[test]
fn the_published_sum_is_the_mean_times_the_tables() {
    let mean = forward(&Inputs::new(Normalization::BucketMean, true).problem(), &State::zeros(8, VALUE_DIM)).0;
    let sum = forward(&Inputs::new(Normalization::BucketSum, true).problem(), &State::zeros(8, VALUE_DIM)).0;
    for (mean, sum) in mean.iter().flatten().zip(sum.iter().flatten()) {
        assert!((mean * TABLES as f64 - sum).abs() < 1e-14);
    }
}

const WINDOW: usize = 4;

/// What a loss through window and RACE depends on.
#[derive(Clone)]
struct Mixed {
    inputs: Inputs,
    scale: f64,
    past_k: Vec<f64>,
    past_v: Vec<f64>,
    gates: Vec<f64>,
}

impl Mixed {
    /// After as many tokens as there are keys of a past.
    fn new(past: usize) -> Self {
        let mut inputs = Inputs::new(Normalization::Ratio, true);
        inputs.planes = numbers(1, TABLES * PLANES * DIM);
        let (past_k, past_v) = (numbers(40, past * DIM), numbers(41, past * VALUE_DIM));
        Self { inputs, scale: 0.7, past_k, past_v, gates: vec![0.3, 0.8] }
    }

    fn window(&self) -> Window<'_> {
        Window { tokens: WINDOW, scale: self.scale, past_k: &self.past_k, past_v: &self.past_v }
    }

    fn outputs(&self) -> Vec<Vec<f64>> {
        let race = forward(&self.inputs.problem(), &self.inputs.initial).0;
        let exact = window_forward(&self.inputs.problem(), &self.window());
        self.gates.iter().zip(exact.iter().zip(&race)).map(|(g, (exact, race))| mix(*g, exact, race)).collect()
    }

    fn loss(&self, grad_o: &[Vec<f64>]) -> f64 {
        self.outputs().iter().flatten().zip(grad_o.iter().flatten()).map(|(o, g)| o * g).sum()
    }
}

/// dq and dk of both halves together, those of the past's keys and values, and that of each gate.
#[test]
fn gradients_through_window_and_gate_are_limits_of_differences() {
    // None before, fewer than the window reaches, just as many, and more.
    for past in [0, 2, WINDOW - 1, 6] {
        let mixed = Mixed::new(past);
        let grad_o: Vec<Vec<f64>> = (0..HEADS).map(|h| numbers(20 + h as u64, TOKENS * VALUE_DIM)).collect();
        let problem = mixed.inputs.problem();
        let race = forward(&problem, &mixed.inputs.initial).0;
        let exact = window_forward(&problem, &mixed.window());
        let halves: Vec<_> =
            (0..HEADS).map(|h| mix_backward(mixed.gates[h], &exact[h], &race[h], &grad_o[h])).collect();
        let to_window: Vec<&[f64]> = halves.iter().map(|(window, ..)| window.as_slice()).collect();
        let to_race: Vec<&[f64]> = halves.iter().map(|(_, race, _)| race.as_slice()).collect();
        let none = State::zeros(TABLES << PLANES, VALUE_DIM);
        let of_race = backward(&problem, &mixed.inputs.initial, &to_race, &none);
        let of_window = window_backward(&problem, &mixed.window(), &to_window);
        let check = |what: &str, gradient: &[f64], at: &dyn Fn(&mut Mixed, usize) -> &mut f64| {
            for (i, gradient) in gradient.iter().enumerate() {
                let nudged = |by: f64| {
                    let mut mixed = mixed.clone();
                    *at(&mut mixed, i) += by;
                    mixed.loss(&grad_o)
                };
                let difference = (nudged(1e-5) - nudged(-1e-5)) / 2e-5;
                assert!((difference - gradient).abs() < 1e-8, "{what}[{i}] after {past}: {gradient}, {difference}");
            }
        };
        let sum = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x + y).collect::<Vec<_>>();
        for h in 0..HEADS {
            check("dq", &sum(&of_race.dq[h], &of_window.dq[h]), &|x, i| &mut x.inputs.q[h][i]);
        }
        check("dk", &sum(&of_race.dk, &of_window.dk), &|x, i| &mut x.inputs.k[i]);
        check("dv", &sum(&of_race.dv, &of_window.dv), &|x, i| &mut x.inputs.v[i]);
        check("dpast_k", &of_window.dpast_k, &|x, i| &mut x.past_k[i]);
        check("dpast_v", &of_window.dpast_v, &|x, i| &mut x.past_v[i]);
        let d_gates: Vec<f64> = halves.iter().map(|(_, _, d_gate)| *d_gate).collect();
        check("dgate", &d_gates, &|x, i| &mut x.gates[i]);
        let wrong = std::panic::catch_unwind(|| check("dgate", &[d_gates[0] + 1e-6], &|x, i| &mut x.gates[i]));
        assert!(wrong.is_err(), "an error of 1e-6 passed");
    }
}

/// Cut anywhere, the window reads the rest of itself from the past, and the past's gradient is that of the first part.
#[test]
fn a_past_is_the_part_before() {
    let mixed = Mixed::new(0);
    let whole = window_forward(&mixed.inputs.problem(), &mixed.window());
    let grad_o: Vec<Vec<f64>> = (0..HEADS).map(|h| numbers(20 + h as u64, TOKENS * VALUE_DIM)).collect();
    let views: Vec<&[f64]> = grad_o.iter().map(Vec::as_slice).collect();
    let want = window_backward(&mixed.inputs.problem(), &mixed.window(), &views);
    for cut in 1..TOKENS {
        let part = |from: usize, to: usize| {
            let mut inputs = mixed.inputs.clone();
            inputs.q = inputs.q.iter().map(|q| q[from * DIM..to * DIM].to_vec()).collect();
            inputs.k = inputs.k[from * DIM..to * DIM].to_vec();
            inputs.v = inputs.v[from * VALUE_DIM..to * VALUE_DIM].to_vec();
            let (past_k, past_v) = (mixed.inputs.k[..from * DIM].to_vec(), mixed.inputs.v[..from * VALUE_DIM].to_vec());
            Mixed { inputs, past_k, past_v, ..mixed.clone() }
        };
        let (first, rest) = (part(0, cut), part(cut, TOKENS));
        let at = cut * VALUE_DIM;
        let of = |x: &Mixed, range: std::ops::Range<usize>| {
            let views: Vec<&[f64]> = grad_o.iter().map(|g| &g[range.clone()]).collect();
            (
                window_forward(&x.inputs.problem(), &x.window()),
                window_backward(&x.inputs.problem(), &x.window(), &views),
            )
        };
        let ((o1, g1), (o2, g2)) = (of(&first, 0..at), of(&rest, at..TOKENS * VALUE_DIM));
        for h in 0..HEADS {
            assert_eq!([o1[h].clone(), o2[h].clone()].concat(), whole[h]);
        }
        let dk: Vec<f64> = g1.dk.iter().zip(&g2.dpast_k).map(|(x, y)| x + y).chain(g2.dk).collect();
        assert!(dk.iter().zip(&want.dk).all(|(x, y)| (x - y).abs() < 1e-14));
    }
}
