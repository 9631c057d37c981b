//! `race_*`: forward, backward and decoding.
//!
//! The inputs of a case stand in `race_<case>_in`, its results in `race_<case>_<normalization>_<causal|full>`.

use super::fixture::{Array, Fixture, Result, unfit};
use super::{Check, Report};
use half::f16;
use softhash::race::reference as math;
use softhash::{
    Beta, DType, Device, Hyperplanes, Normalization, Race, RaceConfig, RaceOptions, RaceShape, StateParts, Tensor,
    TensorView,
};

/// max|a − b| / max|b| that forward passes and dv, other gradients, and the gradient of β may show.
const FORWARD: f64 = 5e-6;
const GRADIENT: f64 = 3e-5;
const BETA: f64 = 1e-4;

/// One case's inputs, as the fixture lays them out: heads before tokens.
struct Case<'a> {
    num_q_heads: usize,
    num_kv_heads: usize,
    tokens: usize,
    dim: usize,
    tables: usize,
    planes: usize,
    rows: &'a Array,
    beta: f64,
    q: &'a Array,
    k: &'a Array,
    v: &'a Array,
}

impl<'a> Case<'a> {
    fn new(case: &'a Fixture) -> Result<Self> {
        let [tables, planes, dim] = case.dims("planes")?;
        let [num_q_heads, tokens, _] = case.dims("q")?;
        let [num_kv_heads, _, _] = case.dims("k")?;
        let q = case.shaped("q", &[num_q_heads, tokens, dim])?;
        let k = case.shaped("k", &[num_kv_heads, tokens, dim])?;
        let v = case.shaped("v", &[num_kv_heads, tokens, dim])?;
        if !num_q_heads.is_multiple_of(num_kv_heads) || planes > 8 {
            return unfit(format!("{num_q_heads} query heads on {num_kv_heads} kv heads with {planes} planes"));
        }
        if [q, k, v].iter().any(|x| x.dtype != Some(DType::F16)) {
            return unfit("q, k and v must be F16");
        }
        let rows = case.array("planes")?;
        Ok(Self { num_q_heads, num_kv_heads, tokens, dim, tables, planes, rows, beta: case.scalar("beta")?, q, k, v })
    }

    fn buckets(&self) -> usize {
        self.tables << self.planes
    }

    fn config(&self, normalization: Normalization, causal: bool) -> RaceConfig {
        RaceConfig {
            tables: self.tables,
            planes: self.planes,
            ensembles: 1,
            beta: Beta::Shared(self.beta as f32),
            normalization,
            causal,
            hyperplanes: Hyperplanes::Supplied(self.rows.data.iter().map(|&x| x as f32).collect()),
            ..RaceConfig::default()
        }
    }

    fn race(&self, device: &Device, normalization: Normalization, causal: bool) -> Result<Race> {
        let shape = RaceShape {
            num_q_heads: self.num_q_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.dim,
            value_dim: self.dim,
            dtype: DType::F16,
        };
        Ok(Race::new(device, self.config(normalization, causal), shape)?)
    }

    /// `[head, token, channel]` as f16 `[token, head, channel]`, tokens of a range.
    fn tokens_first(&self, x: &[f64], heads: usize, tokens: std::ops::Range<usize>) -> Vec<f16> {
        let at = |h: usize, t: usize| (h * self.tokens + t) * self.dim;
        let rows = tokens.flat_map(|t| (0..heads).map(move |h| at(h, t)));
        rows.flat_map(|at| &x[at..at + self.dim]).map(|&x| f16::from_f64(x)).collect()
    }

    /// `[token, head, channel]` back to `[head, token, channel]`.
    fn heads_first(&self, x: &Tensor, heads: usize) -> Result<Vec<f64>> {
        let x = x.read_blocking()?.to_f32();
        let tokens = x.len() / heads / self.dim;
        let at = |h: usize, t: usize| (t * heads + h) * self.dim;
        let rows = (0..heads).flat_map(|h| (0..tokens).map(move |t| at(h, t)));
        Ok(rows.flat_map(|at| &x[at..at + self.dim]).map(|&x| f64::from(x)).collect())
    }

    /// The reference's view of a kv head.
    fn problem(&self, kv_head: usize, normalization: Normalization, causal: bool) -> math::Problem<'_> {
        let group = self.num_q_heads / self.num_kv_heads;
        let one = self.tokens * self.dim;
        let head = |x: &'_ Array, h: usize| -> std::ops::Range<usize> {
            debug_assert!(x.data.len() >= (h + 1) * one);
            h * one..(h + 1) * one
        };
        math::Problem {
            tables: self.tables,
            planes_per_table: self.planes,
            planes: &self.rows.data,
            beta: self.beta,
            normalization,
            epsilon: if normalization == Normalization::Ratio { 0.0 } else { Normalization::EPSILON },
            causal,
            head_dim: self.dim,
            value_dim: self.dim,
            q: (kv_head * group..(kv_head + 1) * group).map(|h| &self.q.data[head(self.q, h)]).collect(),
            k: &self.k.data[head(self.k, kv_head)],
            v: &self.v.data[head(self.v, kv_head)],
        }
    }

    fn state(&self, a: &[f64], b: &[f64], kv_head: usize) -> math::State {
        let s = self.buckets();
        let rows = kv_head * s..(kv_head + 1) * s;
        math::State { a: a[rows.clone()].to_vec(), b: b[rows.start * self.dim..rows.end * self.dim].to_vec() }
    }
}

/// Normalisation and causality, from a case's name.
fn mode(name: &str) -> Result<(Normalization, bool)> {
    for (suffix, mode) in [
        ("_ratio_causal", (Normalization::Ratio, true)),
        ("_ratio_full", (Normalization::Ratio, false)),
        ("_bucket_mean_causal", (Normalization::BucketMean, true)),
        ("_bucket_mean_full", (Normalization::BucketMean, false)),
    ] {
        if name.ends_with(suffix) {
            return Ok(mode);
        }
    }
    unfit(format!("the name {name} says no normalisation and causality"))
}

fn bounded(report: &mut Report<'_>, by: &str, checks: [(&str, Vec<f64>, &Array); 10]) {
    for (tensor, got, want) in checks {
        let bound = match (by, tensor) {
            ("reference", _) if want.wide => 1e-11,
            ("reference", _) => 2.4e-7,
            (_, "dbeta") => BETA,
            (_, "out" | "dv" | "AT" | "BT" | "out stepwise") => FORWARD,
            _ => GRADIENT,
        };
        let error = super::relative_error(&got, &want.data);
        report.checks.push(Check { name: format!("{}: {tensor} ({by})", report.case), error, bound });
    }
}

/// A case with its results.
pub fn judge(device: &Device, case: &Fixture, report: &mut Report<'_>) -> Result<()> {
    let c = Case::new(case)?;
    let (normalization, causal) = mode(&case.name)?;
    let (s, d) = (c.buckets(), c.dim);
    let a0 = case.shaped("A0", &[c.num_kv_heads, s])?;
    let b0 = case.shaped("B0", &[c.num_kv_heads, s, d])?;
    let grad_a = case.shaped("grad_AT", &[c.num_kv_heads, s])?;
    let grad_b = case.shaped("grad_BT", &[c.num_kv_heads, s, d])?;
    let grad_o = case.shaped("grad_out", &[c.num_q_heads, c.tokens, d])?;
    let want = Wanted {
        out: case.shaped("out", &[c.num_q_heads, c.tokens, d])?,
        at: case.shaped("AT", &[c.num_kv_heads, s])?,
        bt: case.shaped("BT", &[c.num_kv_heads, s, d])?,
        dq: case.shaped("dq", &[c.num_q_heads, c.tokens, d])?,
        dk: case.shaped("dk", &[c.num_kv_heads, c.tokens, d])?,
        dv: case.shaped("dv", &[c.num_kv_heads, c.tokens, d])?,
        dplanes: case.shaped("dplanes", &[c.tables, c.planes, d])?,
        dbeta: case.shaped("dbeta", &[1])?,
        da0: case.shaped("dA0", &[c.num_kv_heads, s])?,
        db0: case.shaped("dB0", &[c.num_kv_heads, s, d])?,
    };

    // The reference, kv head by kv head.
    let mut got = Found { dplanes: vec![0.0; c.rows.data.len()], ..Found::default() };
    let group = c.num_q_heads / c.num_kv_heads;
    let one = c.tokens * d;
    for h in 0..c.num_kv_heads {
        let problem = c.problem(h, normalization, causal);
        let (initial, grad_final) = (c.state(&a0.data, &b0.data, h), c.state(&grad_a.data, &grad_b.data, h));
        let (out, last) = math::forward(&problem, &initial);
        let grads: Vec<&[f64]> = (h * group..(h + 1) * group).map(|g| &grad_o.data[g * one..(g + 1) * one]).collect();
        let back = math::backward(&problem, &initial, &grads, &grad_final);
        got.out.extend(out.concat());
        got.at.extend(last.a);
        got.bt.extend(last.b);
        got.dq.extend(back.dq.concat());
        got.dk.extend(back.dk);
        got.dv.extend(back.dv);
        got.dbeta += back.dbeta;
        got.dplanes.iter_mut().zip(back.dplanes).for_each(|(x, y)| *x += y);
        got.da0.extend(back.dinitial.a);
        got.db0.extend(back.dinitial.b);
    }
    bounded(report, "reference", want.against(got));

    // The device.
    let mut race = c.race(device, normalization, causal)?;
    let all = 0..c.tokens;
    let q = c.tokens_first(&c.q.data, c.num_q_heads, all.clone());
    let k = c.tokens_first(&c.k.data, c.num_kv_heads, all.clone());
    let v = c.tokens_first(&c.v.data, c.num_kv_heads, all.clone());
    let g = c.tokens_first(&grad_o.data, c.num_q_heads, all);
    let of_q = [1, c.tokens, c.num_q_heads, d];
    let of_kv = [1, c.tokens, c.num_kv_heads, d];
    let (q, g) = (TensorView::f16(&q, of_q), TensorView::f16(&g, of_q));
    let (k, v) = (TensorView::f16(&k, of_kv), TensorView::f16(&v, of_kv));
    let options = RaceOptions { output: Some(DType::F32), ..RaceOptions::default() };
    let initial =
        race.write_state(&StateParts { a: a0.data.clone(), b: b0.data.clone(), ..StateParts::default() }, &[0])?;
    let arriving = StateParts { a: grad_a.data.clone(), b: grad_b.data.clone(), ..StateParts::default() };
    let grad_final = race.write_state_gradient(&arriving, 1)?;
    let forward = race.forward_with(&q, &k, &v, Some(&initial), &options)?;
    let last = race.read_state(&forward.state)?;
    let back = race.backward(&q, &k, &v, &g, Some(&initial), Some(&grad_final), &options)?;
    let of_initial = race.read_state_gradient(&back.d_initial_state)?;
    let wide =
        |x: &Tensor| -> Result<Vec<f64>> { Ok(x.read_blocking()?.to_f32().into_iter().map(f64::from).collect()) };
    let found = Found {
        out: c.heads_first(&forward.o, c.num_q_heads)?,
        at: last.a,
        bt: last.b,
        dq: c.heads_first(&back.dq, c.num_q_heads)?,
        dk: c.heads_first(&back.dk, c.num_kv_heads)?,
        dv: c.heads_first(&back.dv, c.num_kv_heads)?,
        dplanes: wide(&back.d_planes)?,
        dbeta: wide(&back.d_beta)?[0],
        da0: of_initial.a,
        db0: of_initial.b,
    };
    bounded(report, "device", want.against(found));
    Ok(())
}

#[derive(Default)]
struct Found {
    out: Vec<f64>,
    at: Vec<f64>,
    bt: Vec<f64>,
    dq: Vec<f64>,
    dk: Vec<f64>,
    dv: Vec<f64>,
    dplanes: Vec<f64>,
    dbeta: f64,
    da0: Vec<f64>,
    db0: Vec<f64>,
}

struct Wanted<'a> {
    out: &'a Array,
    at: &'a Array,
    bt: &'a Array,
    dq: &'a Array,
    dk: &'a Array,
    dv: &'a Array,
    dplanes: &'a Array,
    dbeta: &'a Array,
    da0: &'a Array,
    db0: &'a Array,
}

impl<'a> Wanted<'a> {
    fn against(&self, got: Found) -> [(&'static str, Vec<f64>, &'a Array); 10] {
        [
            ("out", got.out, self.out),
            ("AT", got.at, self.at),
            ("BT", got.bt, self.bt),
            ("dq", got.dq, self.dq),
            ("dk", got.dk, self.dk),
            ("dv", got.dv, self.dv),
            ("dplanes", got.dplanes, self.dplanes),
            ("dbeta", vec![got.dbeta], self.dbeta),
            ("dA0", got.da0, self.da0),
            ("dB0", got.db0, self.db0),
        ]
    }
}

/// A prompt and single steps after it.
pub fn judge_decoding(device: &Device, case: &Fixture, report: &mut Report<'_>) -> Result<()> {
    let c = Case::new(case)?;
    let (s, d) = (c.buckets(), c.dim);
    let prefix = case.count("prefix_len", c.tokens)?;
    let states = [("prefix", "A_prefix", "B_prefix"), ("end", "AT", "BT")];
    for (normalization, tensor) in [(Normalization::Ratio, "out_ratio"), (Normalization::BucketMean, "out_bucket_mean")]
    {
        let out = case.shaped(tensor, &[c.num_q_heads, c.tokens, d])?;
        let mut reference = Vec::new();
        for h in 0..c.num_kv_heads {
            let (o, _) = math::forward(&c.problem(h, normalization, true), &math::State::zeros(s, d));
            reference.extend(o.concat());
        }
        report.reference(tensor, &reference, out);

        let mut race = c.race(device, normalization, true)?;
        let options = RaceOptions { output: Some(DType::F32), ..RaceOptions::default() };
        let mut state = race.new_state(1)?;
        let mut rows = vec![Vec::new(); c.num_q_heads];
        let ends = std::iter::once(prefix).chain(prefix + 1..=c.tokens);
        let mut from = 0;
        for to in ends {
            let of_q = [1, to - from, c.num_q_heads, d];
            let of_kv = [1, to - from, c.num_kv_heads, d];
            let q = c.tokens_first(&c.q.data, c.num_q_heads, from..to);
            let k = c.tokens_first(&c.k.data, c.num_kv_heads, from..to);
            let v = c.tokens_first(&c.v.data, c.num_kv_heads, from..to);
            let (q, k, v) = (TensorView::f16(&q, of_q), TensorView::f16(&k, of_kv), TensorView::f16(&v, of_kv));
            let o = race.append_with(&mut state, &q, &k, &v, &options)?;
            let o = c.heads_first(&o, c.num_q_heads)?;
            for (rows, o) in rows.iter_mut().zip(o.chunks_exact((to - from) * d)) {
                rows.extend_from_slice(o);
            }
            from = to;
            for (at, a, b) in states {
                if (at, to) == ("prefix", prefix) || (at, to) == ("end", c.tokens) {
                    let parts = race.read_state(&state)?;
                    let name = |part: &str| format!("{part} of {tensor}");
                    report.device(&name(a), &parts.a, &case.shaped(a, &[c.num_kv_heads, s])?.data, FORWARD);
                    report.device(&name(b), &parts.b, &case.shaped(b, &[c.num_kv_heads, s, d])?.data, FORWARD);
                }
            }
        }
        report.device(tensor, &rows.concat(), &out.data, FORWARD);
    }
    Ok(())
}
