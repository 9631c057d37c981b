//! RACE with the exact window beside it against the f64 reference, and the laws of its ring; on the CPU and on a GPU.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    #[cfg(feature = "wgpu")]
    pub mod device;
    #[allow(dead_code, reason = "each test takes what it needs")]
    pub mod race;
}

use common::race::{Case, Data, Elements, error, wide};
use softhash::race::reference as math;
use softhash::{
    DType, Device, Error, Gate, Normalization, Race, RaceConfig, RaceGradients, RaceOptions, RaceShape, RaceState,
    StateGradient, StateParts, TensorView,
};
use std::ops::Range;

fn name_of(device: &Device) -> &'static str {
    if device.is_cpu() { "CPU" } else { "GPU" }
}

/// The devices, each made once, so that each kernel is compiled once.
fn devices() -> Vec<Device> {
    #[cfg(feature = "wgpu")]
    {
        static GPU: std::sync::OnceLock<Device> = std::sync::OnceLock::new();
        vec![Device::cpu(), GPU.get_or_init(common::device::gpu).clone()]
    }
    #[cfg(not(feature = "wgpu"))]
    vec![Device::cpu()]
}

#[derive(Clone, Default)]
struct Results {
    o: Vec<f64>,
    a: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    d_gate: Vec<f64>,
    d_beta: Vec<f64>,
    d_planes: Vec<f64>,
    d_b: Vec<f64>,
    d_ring_k: Vec<f64>,
    d_ring_v: Vec<f64>,
}

fn norm(x: &[f64]) -> f64 {
    x.iter().map(|x| x * x).sum::<f64>().sqrt()
}

fn wider(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

impl Results {
    /// Errors relative to the parts, each with its name and bound.
    fn errors(&self, want: &Self, case: &Case) -> Vec<(&'static str, f64, f64)> {
        let rounding = match case.output {
            DType::F16 => 2f64.powi(-11),
            DType::Bf16 => 2f64.powi(-8),
            _ => 0.0,
        };
        let parts: [(_, &[f64], &[f64], f64); 13] = [
            ("o", &self.o, &want.o, 3e-6 + rounding),
            ("A", &self.a, &want.a, 3e-6),
            ("ring of k", &self.k, &want.k, 0.0),
            ("ring of v", &self.v, &want.v, 0.0),
            ("dq", &self.dq, &want.dq, 3e-5),
            ("dk", &self.dk, &want.dk, 3e-5),
            ("dv", &self.dv, &want.dv, 5e-6),
            ("dgate", &self.d_gate, &want.d_gate, 1e-5),
            ("dbeta", &self.d_beta, &want.d_beta, 1e-4),
            ("dplanes", &self.d_planes, &want.d_planes, 5e-5),
            ("dB", &self.d_b, &want.d_b, 1e-5),
            ("ring of dk", &self.d_ring_k, &want.d_ring_k, 3e-5),
            ("ring of dv", &self.d_ring_v, &want.d_ring_v, 5e-6),
        ];
        // Sums over all tokens, in which parts as large as the planes' gradients or as o may cancel.
        let least = |name| match name {
            "dbeta" => 0.05 * norm(&want.d_planes),
            "dgate" => 0.1 * norm(&want.o),
            "dq" | "dk" => 1e-2 * norm(&want.dv),
            "dplanes" => 1e-2 * norm(&want.dv),
            _ => 1e-300,
        };
        let off = |x: &[f64], y: &[f64]| {
            assert_eq!(x.len(), y.len());
            norm(&x.iter().zip(y).map(|(x, y)| x - y).collect::<Vec<_>>())
        };
        parts.map(|(name, x, y, bound)| (name, off(x, y) / norm(y).max(least(name)), bound)).into()
    }

    fn judge(&self, want: &Self, case: &Case, device: &str) {
        self.judge_within(0.0, want, case, device);
    }

    /// With `more` added to each bound but those of what is kept exactly.
    fn judge_within(&self, more: f64, want: &Self, case: &Case, device: &str) {
        let errors = self.errors(want, case).into_iter();
        let wrong: Vec<_> =
            errors.filter(|(_, e, bound)| e.is_nan() || *e > if *bound > 0.0 { bound + more } else { 0.0 }).collect();
        assert!(wrong.is_empty(), "{device}, window {} after {}, {}: {wrong:?}", case.window, case.seen, case.name());
    }
}

/// Element of a ring's row.
fn ring_at(case: &Case, b: usize, position: isize, kv_head: usize, dim: usize) -> usize {
    let slot = (case.seen as isize + position).rem_euclid(case.window as isize) as usize;
    ((b * case.window + slot) * case.heads.1 + kv_head) * dim
}

/// What the reference says.
fn expected(case: &Case, data: &Data) -> Results {
    let ((hq, hkv), (d, dim)) = (case.heads, case.dims);
    let group = hq / hkv;
    let rows = case.batch() * case.tokens;
    let mut out = Results {
        o: vec![0.0; rows * hq * dim],
        k: wider(&data.initial.window_k),
        v: wider(&data.initial.window_v),
        dq: vec![0.0; rows * hq * d],
        dk: vec![0.0; rows * hkv * d],
        dv: vec![0.0; rows * hkv * dim],
        d_gate: vec![0.0; case.gates.len()],
        d_beta: vec![0.0; case.betas.len()],
        d_planes: vec![0.0; data.planes.len()],
        d_ring_k: vec![0.0; data.initial.window_k.len()],
        d_ring_v: vec![0.0; data.initial.window_v.len()],
        ..Results::default()
    };
    let share = 1.0 / case.ensembles as f64;
    let mut of_race = vec![0.0; rows * hq * dim];
    case.each_unit(data, &mut |unit| {
        let (o, last) = math::forward(&unit.problem, &unit.initial);
        for (g, o) in o.iter().enumerate() {
            case.add_rows(&mut of_race, unit.batch, hq, unit.kv_head * group + g, o, share);
        }
        out.a.extend(last.a);
    });
    case.each_unit(data, &mut |unit| {
        let (b, h, length) = (unit.batch, unit.kv_head, case.lengths[unit.batch]);
        let seen = if case.initial { case.seen } else { 0 };
        let past = seen.min(case.window - 1) as isize;
        let of_ring = |x: &[f32], dim: usize| -> Vec<f64> {
            (-past..0).flat_map(|p| wider(&x[ring_at(case, b, p, h, dim)..][..dim])).collect()
        };
        let (past_k, past_v) = (of_ring(&data.initial.window_k, d), of_ring(&data.initial.window_v, dim));
        let scale = case.window_scale.map_or(1.0 / (d as f64).sqrt(), f64::from);
        let window = math::Window { tokens: case.window, scale, past_k: &past_k, past_v: &past_v };
        let of_window = math::window_forward(&unit.problem, &window);
        let (mut to_window, mut to_race) = (Vec::new(), Vec::new());
        for (g, of_window) in of_window.iter().enumerate() {
            let head = h * group + g;
            let gate = f64::from(case.gates[head % case.gates.len()]);
            let grad_o = case.rows(&data.grad_o, b, hq, head, dim);
            let race: Vec<f64> = (0..length)
                .flat_map(|t| &of_race[((b * case.tokens + t) * hq + head) * dim..][..dim])
                .copied()
                .collect();
            let (window, race_grad, d_gate) = math::mix_backward(gate, of_window, &race, &grad_o);
            if unit.ensemble == 0 {
                case.add_rows(&mut out.o, b, hq, head, &math::mix(gate, of_window, &race), 1.0);
                out.d_gate[head % case.gates.len()] += d_gate;
            }
            to_window.push(window);
            to_race.push(race_grad.iter().map(|x| x * share).collect::<Vec<_>>());
        }
        let race_views: Vec<&[f64]> = to_race.iter().map(Vec::as_slice).collect();
        let grad_final = case.state(&data.grad_final, b, h, unit.ensemble);
        let back = math::backward(&unit.problem, &unit.initial, &race_views, &grad_final);
        for (g, dq) in back.dq.iter().enumerate() {
            case.add_rows(&mut out.dq, b, hq, h * group + g, dq, 1.0);
        }
        case.add_rows(&mut out.dk, b, hkv, h, &back.dk, 1.0);
        case.add_rows(&mut out.dv, b, hkv, h, &back.dv, 1.0);
        out.d_beta[h % case.betas.len()] += back.dbeta;
        let set = if case.per_head { h } else { 0 };
        let at = (set * case.ensembles + unit.ensemble) * back.dplanes.len();
        out.d_planes[at..].iter_mut().zip(back.dplanes).for_each(|(x, y)| *x += y);
        out.d_b.extend(back.dinitial.b);
        if unit.ensemble > 0 {
            return;
        }
        let window_views: Vec<&[f64]> = to_window.iter().map(Vec::as_slice).collect();
        let back = math::window_backward(&unit.problem, &window, &window_views);
        for (g, dq) in back.dq.iter().enumerate() {
            case.add_rows(&mut out.dq, b, hq, h * group + g, dq, 1.0);
        }
        case.add_rows(&mut out.dk, b, hkv, h, &back.dk, 1.0);
        case.add_rows(&mut out.dv, b, hkv, h, &back.dv, 1.0);
        let mut sides = [
            (&mut out.d_ring_k, &mut out.dk, &mut out.k, &data.grad_final.window_k, &back.dpast_k, &data.k, d),
            (&mut out.d_ring_v, &mut out.dv, &mut out.v, &data.grad_final.window_v, &back.dpast_v, &data.v, dim),
        ];
        for (d_ring, dx, ring, arriving, of_past, x, dim) in &mut sides {
            let dim = *dim;
            for (row, p) in of_past.chunks_exact(dim).zip(-past..) {
                let to = &mut d_ring[ring_at(case, b, p, h, dim)..][..dim];
                to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
            }
            // What arrives for the last tokens, of this call or before it.
            let length = length as isize;
            for p in (length - case.window as isize).max(-(seen as isize))..length {
                let at = ring_at(case, b, p, h, dim);
                let arrives = arriving[at..at + dim].iter().map(|x| f64::from(*x));
                let token = ((b * case.tokens + p.max(0) as usize) * hkv + h) * dim;
                let to = if p >= 0 { &mut dx[token..token + dim] } else { &mut d_ring[at..at + dim] };
                to.iter_mut().zip(arrives).for_each(|(to, x)| *to += x);
                if p >= 0 {
                    let taken = x[token..token + dim].iter().map(|x| f64::from(*x));
                    ring[at..at + dim].iter_mut().zip(taken).for_each(|(to, x)| *to = x);
                }
            }
        }
    });
    out
}

fn begin(case: &Case, race: &Race, data: &Data) -> (RaceState, StateGradient) {
    let seen = if case.initial { case.seen as u64 } else { 0 };
    let state = race.write_state(&data.initial, &vec![seen; case.batch()]).unwrap();
    (state, race.write_state_gradient(&data.grad_final, case.batch()).unwrap())
}

fn read(race: &Race, o: &[f64], state: &RaceState, back: &RaceGradients) -> Results {
    let StateParts { a, window_k, window_v, .. } = race.read_state(state).unwrap();
    let of_ends = race.read_state_gradient(&back.d_initial_state).unwrap();
    Results {
        o: o.to_vec(),
        a,
        k: wider(&window_k),
        v: wider(&window_v),
        dq: wide(&back.dq),
        dk: wide(&back.dk),
        dv: wide(&back.dv),
        d_gate: wide(back.d_gate.as_ref().unwrap()),
        d_beta: wide(&back.d_beta),
        d_planes: wide(&back.d_planes),
        d_b: of_ends.b,
        d_ring_k: wider(&of_ends.window_k),
        d_ring_v: wider(&of_ends.window_v),
    }
}

fn computed(device: &Device, case: &Case, data: &Data) -> Results {
    let mut race = case.race_on(device, data);
    let elements = case.elements(data);
    let shapes = case.shapes();
    let [q, k, v, g]: [TensorView<'_>; 4] = std::array::from_fn(|i| elements[i].view(shapes[i]));
    let (state, gradient) = begin(case, &race, data);
    let (initial, grad_final) = if case.initial { (Some(&state), Some(&gradient)) } else { (None, None) };
    let out = race.forward_with(&q, &k, &v, initial, &case.options()).unwrap();
    assert_eq!(out.o.dtype(), case.output);
    let back = race.backward(&q, &k, &v, &g, initial, grad_final, &case.options()).unwrap();
    // What the calls were given is as it was.
    assert_eq!(race.read_state(&state).unwrap().window_k, data.initial.window_k);
    assert_eq!(race.read_state_gradient(&gradient).unwrap().window_v, data.grad_final.window_v);
    read(&race, &wide(&out.o), &out.state, &back)
}

fn judge(case: &Case) {
    let data = case.data();
    let want = expected(case, &data);
    for device in devices() {
        computed(&device, case, &data).judge(&want, case, name_of(&device));
    }
}

fn small() -> Case {
    Case {
        heads: (4, 2),
        dims: (16, 12),
        hash: (2, 2),
        tokens: 70,
        lengths: vec![70, 0, 33],
        gates: vec![0.3, 0.6, 0.0, 1.0],
        window: 16,
        ..Case::default()
    }
}

#[test]
fn any_window_after_nothing_or_a_ring() {
    for window in [1, 3, 64, 100] {
        for (seen, initial) in [(0, false), (2, true), (1000, true)] {
            judge(&Case { window, seen, initial, ..small() });
        }
    }
}

#[test]
fn any_shape() {
    for (heads, dims, window) in
        [((1, 1), (64, 64), 64), ((4, 1), (80, 64), 20), ((4, 4), (64, 80), 7), ((2, 1), (128, 128), 100)]
    {
        let normalization = if heads.1 == 4 { Normalization::BucketMean } else { Normalization::Ratio };
        let case = Case { heads, dims, window, normalization, gates: vec![0.7], ..small() };
        judge(&Case { tokens: 66, lengths: vec![66, 40], seen: 33, initial: true, ..case });
    }
    // Odd rows, two ensembles, a scale of the caller's.
    let case =
        Case { heads: (3, 1), dims: (5, 7), ensembles: 2, window_scale: Some(-0.8), gates: vec![0.2], ..small() };
    judge(&Case { seen: 9, initial: true, ..case });
}

#[test]
fn any_dtype() {
    for (dtype, output) in
        [(DType::F16, DType::F16), (DType::F16, DType::F32), (DType::Bf16, DType::Bf16), (DType::Bf16, DType::F32)]
    {
        let case = Case { dtype, output, seen: 21, initial: true, ..small() };
        judge(&Case { dims: (24, 18), ..case });
    }
}

/// Shapes that the tensor cores of a CUDA device take. There computed operands are rounded to bf16, in as many parts as
/// the dtype of o asks for, which leaves `more`.
fn of_tensor_cores(dtype: DType, output: DType, heads: (usize, usize), dims: (usize, usize), window: usize, more: f64) {
    let tokens = window + 50;
    let gates = [0.3, 0.6, 0.0, 1.0, 0.5, 0.8][..heads.0].into();
    let case = Case { dtype, output, heads, dims, window, tokens, gates, seen: 70, initial: true, ..small() };
    let case = Case { lengths: vec![tokens, 0, tokens - 37], ..case };
    let data = case.data();
    let want = expected(&case, &data);
    for device in devices() {
        let more = if device.path_name() == "cuda" { more } else { 0.0 };
        computed(&device, &case, &data).judge_within(more, &want, &case, name_of(&device));
    }
}

// Tests of their own, so that their kernels are compiled at the same time.
#[test]
fn tensor_cores_bf16() {
    of_tensor_cores(DType::Bf16, DType::Bf16, (4, 2), (32, 32), 16, 5e-3);
}

#[test]
fn tensor_cores_bf16_large() {
    of_tensor_cores(DType::Bf16, DType::Bf16, (2, 2), (128, 48), 256, 5e-3);
}

#[test]
fn tensor_cores_bf16_to_f32() {
    of_tensor_cores(DType::Bf16, DType::F32, (6, 2), (64, 128), 100, 4e-6);
}

#[test]
fn tensor_cores_f16() {
    of_tensor_cores(DType::F16, DType::F16, (6, 2), (64, 128), 100, 5e-4);
}

#[test]
fn tensor_cores_f16_to_f32() {
    of_tensor_cores(DType::F16, DType::F32, (2, 1), (16, 64), 40, 3e-5);
}

/// The judge sees an error of a hundredth in one row.
#[test]
fn a_planted_error_is_seen() {
    let case = Case { seen: 21, initial: true, ..small() };
    let data = case.data();
    let want = expected(&case, &data);
    let mut got = computed(&Device::cpu(), &case, &data);
    got.judge(&want, &case, "unharmed");
    got.dk[17 * 16..18 * 16].iter_mut().for_each(|x| *x *= 1.01);
    got.d_ring_v[15 * 12] += 1e-3;
    got.d_gate[2] *= 1.01;
    got.k[3] += 1e-6;
    let red: Vec<_> =
        got.errors(&want, &case).into_iter().filter(|(_, e, bound)| e > bound).map(|(name, ..)| name).collect();
    assert_eq!(red, ["ring of k", "dk", "dgate", "ring of dv"]);
}

/// Tokens of a range.
fn cut(x: &[f32], batch: usize, tokens: usize, range: &Range<usize>) -> Vec<f32> {
    let row = x.len() / batch / tokens;
    (0..batch).flat_map(|b| &x[(b * tokens + range.start) * row..(b * tokens + range.end) * row]).copied().collect()
}

/// Segments of any lengths, forward and then backward through the ring, are the whole; so are single steps.
#[test]
fn segments_and_steps_are_the_whole() {
    for window in [1, 3, 16, 64] {
        let case = Case { window, tokens: 60, lengths: vec![60, 60], seen: 5, initial: true, ..small() };
        let data = case.data();
        let want = expected(&case, &data);
        for device in devices() {
            for cuts in [vec![0, 1, 2, 20, 20, 57, 60], (0..=60).step_by(4).collect(), (0..=60).collect::<Vec<_>>()] {
                if cuts.len() > 20 && window != 16 {
                    continue;
                }
                let mut race = case.race_on(&device, &data);
                let (first, mut gradient) = begin(&case, &race, &data);
                let parts: Vec<(Range<usize>, [Vec<f32>; 4])> = cuts
                    .windows(2)
                    .map(|c| c[0]..c[1])
                    .map(|range| {
                        let part = |x: &[f32]| cut(x, 2, case.tokens, &range);
                        (range.clone(), [part(&data.q), part(&data.k), part(&data.v), part(&data.grad_o)])
                    })
                    .collect();
                let shapes = |n: usize| case.shapes().map(|[b, _, h, d]| [b, n, h, d]);
                let mut states = vec![race.fork(&first).unwrap()];
                let mut whole = Results { d_gate: vec![0.0; 4], d_beta: vec![0.0], ..Results::default() };
                whole.d_planes = vec![0.0; want.d_planes.len()];
                let room = |x: &[f64]| vec![0.0; x.len()];
                (whole.o, whole.dq) = (room(&want.o), room(&want.dq));
                (whole.dk, whole.dv) = (room(&want.dk), room(&want.dv));
                let place = |to: &mut [f64], from: &[f64], range: &Range<usize>| {
                    let row = to.len() / 2 / case.tokens;
                    for b in 0..2 {
                        let n = range.len() * row;
                        to[(b * case.tokens + range.start) * row..][..n].copy_from_slice(&from[b * n..][..n]);
                    }
                };
                for (range, [q, k, v, _]) in &parts {
                    let s = shapes(range.len());
                    let mut state = race.fork(states.last().unwrap()).unwrap();
                    let (q, k, v) = (TensorView::f32(q, s[0]), TensorView::f32(k, s[1]), TensorView::f32(v, s[2]));
                    let o = race.append(&mut state, &q, &k, &v).unwrap();
                    place(&mut whole.o, &wide(&o), range);
                    states.push(state);
                }
                for (i, (range, [q, k, v, g])) in parts.iter().enumerate().rev() {
                    let s = shapes(range.len());
                    let (q, k) = (TensorView::f32(q, s[0]), TensorView::f32(k, s[1]));
                    let (v, g) = (TensorView::f32(v, s[2]), TensorView::f32(g, s[3]));
                    let options = RaceOptions::default();
                    let back = race.backward(&q, &k, &v, &g, Some(&states[i]), Some(&gradient), &options).unwrap();
                    place(&mut whole.dq, &wide(&back.dq), range);
                    place(&mut whole.dk, &wide(&back.dk), range);
                    place(&mut whole.dv, &wide(&back.dv), range);
                    for (sum, x) in [
                        (&mut whole.d_gate, back.d_gate.as_ref().unwrap()),
                        (&mut whole.d_beta, &back.d_beta),
                        (&mut whole.d_planes, &back.d_planes),
                    ] {
                        sum.iter_mut().zip(wide(x)).for_each(|(sum, x)| *sum += x);
                    }
                    gradient = back.d_initial_state;
                }
                let StateParts { a, window_k, window_v, .. } = race.read_state(states.last().unwrap()).unwrap();
                let ends = race.read_state_gradient(&gradient).unwrap();
                (whole.a, whole.k, whole.v) = (a, wider(&window_k), wider(&window_v));
                whole.d_b = ends.b;
                (whole.d_ring_k, whole.d_ring_v) = (wider(&ends.window_k), wider(&ends.window_v));
                whole.judge(&want, &case, &format!("{}, cut at {cuts:?}", name_of(&device)));
            }
        }
    }
}

/// The ends of the gate are either half alone.
#[test]
fn a_gate_of_zero_is_race_alone() {
    let case = Case { gates: vec![0.0], ..small() };
    let data = case.data();
    for device in devices() {
        let with = computed(&device, &case, &data);
        let mut alone = Case { window: 0, ..case.clone() }.race_on(&device, &data);
        let elements = case.elements(&data);
        let [q, k, v, _]: [TensorView<'_>; 4] = std::array::from_fn(|i| elements[i].view(case.shapes()[i]));
        let out = alone.forward_with(&q, &k, &v, None, &case.options()).unwrap();
        assert!(error(&with.o, &wide(&out.o)) < 1e-6);
        assert_eq!(out.state.shape().window, None);
    }
}

#[test]
fn rings_are_forked_saved_and_counted() {
    for dtype in [DType::F32, DType::F16, DType::Bf16] {
        let case = Case { dtype, lengths: vec![70, 70], ..small() };
        let data = case.data();
        let ring = (2 * 16 * 2 * (16 + 12) * dtype.size()) as u64;
        let mut bytes = Vec::new();
        for device in devices() {
            let mut race = case.race_on(&device, &data);
            let elements = case.elements(&data);
            let [q, k, v, _]: [TensorView<'_>; 4] = std::array::from_fn(|i| elements[i].view(case.shapes()[i]));
            let mut state = race.forward(&q, &k, &v, None).unwrap().state;
            let without = Case { window: 0, ..case.clone() }.race_on(&device, &data).new_state(2).unwrap().bytes();
            // On CUDA the device counts the tokens of each ring, of two sequences and two kv heads here.
            let counts = if device.path_name() == "cuda" { 2 * 2 * 8 } else { 0 };
            assert_eq!(state.bytes(), without + ring + counts, "{}", name_of(&device));
            let fork = race.fork(&state).unwrap();
            let before = race.read_state(&fork).unwrap();
            bytes.push(race.state_to_bytes(&fork).unwrap());
            race.append(&mut state, &q, &k, &v).unwrap();
            assert_eq!(race.read_state(&fork).unwrap(), before);
            assert_ne!(race.read_state(&state).unwrap().window_k, before.window_k);
            // Files are the same whichever device wrote them, but for the sums' last places.
            for bytes in &bytes {
                let loaded = race.state_from_bytes(bytes).unwrap();
                let loaded = race.read_state(&loaded).unwrap();
                assert_eq!((loaded.window_k, loaded.window_v), (before.window_k.clone(), before.window_v.clone()));
            }
            for other in [
                Case { window: 15, ..case.clone() },
                Case { window: 0, ..case.clone() },
                Case { dtype: if dtype == DType::F16 { DType::F32 } else { DType::F16 }, ..case.clone() },
            ] {
                let data = other.data();
                let race = other.race_on(&device, &data);
                let refused = race.state_from_bytes(&bytes[0]).unwrap_err();
                assert!(refused.to_string().contains("window"), "{refused}");
                assert!(matches!(race.fork(&fork), Err(Error::Shape { .. })));
            }
        }
    }
}

#[test]
fn what_makes_no_window_is_refused() {
    let shape = RaceShape { num_q_heads: 2, num_kv_heads: 1, head_dim: 8, value_dim: 8, dtype: DType::F32 };
    let made = |config: RaceConfig| Race::new(&Device::cpu(), config, shape);
    let refused = |config: RaceConfig, word: &str| {
        let error = made(config).unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    };
    let window = || RaceConfig { window: 4, ..RaceConfig::default() };
    refused(RaceConfig { causal: false, ..window() }, "must be 0 where attention is not causal");
    refused(RaceConfig { window: 1 << 20, ..window() }, "at most 65536");
    refused(RaceConfig { window_scale: Some(f32::NAN), ..window() }, "window_scale");
    for gate in [-0.1, 1.1, f32::NAN] {
        refused(RaceConfig { gate: Gate::Shared(gate), ..window() }, "must be 0 to 1");
    }
    refused(RaceConfig { gate: Gate::PerHead(vec![0.5]), ..window() }, "num_q_heads = 2");
    let mut race = made(window()).unwrap();
    assert!(race.set_gate(Gate::PerHead(vec![0.5, 2.0])).is_err());
    assert_eq!(race.config().gate, Gate::default());
    race.set_gate(Gate::PerHead(vec![0.5, 1.0])).unwrap();
    // A state that its window's keys are missing from, or hold what no number is.
    let parts = race.read_state(&race.new_state(1).unwrap()).unwrap();
    let short = StateParts { window_k: vec![0.0; 31], ..parts.clone() };
    assert!(matches!(race.write_state(&short, &[0]), Err(Error::Shape { tensor: "window_k", .. })));
    let mut bad = parts;
    bad.window_v[19] = f32::INFINITY;
    let index = [0, 2, 0, 3];
    assert_eq!(
        race.write_state(&bad, &[0]).unwrap_err().to_string(),
        Error::NonFinite { op: "write_state", tensor: "window_v", index }.to_string()
    );
}

/// A gate set anew is the one in use.
#[test]
fn gates_can_be_trained() {
    let case = small();
    let data = case.data();
    for device in devices() {
        let mut race = Case { gates: vec![0.5], ..case.clone() }.race_on(&device, &data);
        race.set_gate(Gate::PerHead(case.gates.clone())).unwrap();
        let elements: [Elements; 4] = case.elements(&data);
        let [q, k, v, g]: [TensorView<'_>; 4] = std::array::from_fn(|i| elements[i].view(case.shapes()[i]));
        let out = race.forward_with(&q, &k, &v, None, &case.options()).unwrap();
        let back = race.backward(&q, &k, &v, &g, None, None, &case.options()).unwrap();
        read(&race, &wide(&out.o), &out.state, &back).judge(&expected(&case, &data), &case, "set");
    }
}
