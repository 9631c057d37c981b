//! `socket_*`: one decoding step of a ragged batch under both rules, and dense.

use super::Report;
use super::fixture::{Fixture, Result};
use super::step::{self, Step};
use softhash::socket::reference as math;
use softhash::{Budget, Device, Mode, Rule, Scoring, SocketConfig, Temperature};

const OUTPUT_BOUND: f64 = 1e-5;

/// The case, checked for shape.
struct Case<'a> {
    fixture: &'a Fixture,
    planes: usize,
    rows: &'a [f64],
    q: &'a [f64],
    k: &'a [f64],
    v: &'a [f64],
    batch: usize,
    q_heads: usize,
    kv_heads: usize,
    dim: usize,
    tokens: usize,
    lengths: Vec<usize>,
    beta: f64,
    heavy: usize,
    sink: usize,
    window: usize,
}

const LIMIT: usize = 1 << 24;

pub fn judge(device: &Device, fixture: &Fixture, report: &mut Report<'_>) -> Result<()> {
    let [_, planes, dim] = fixture.dims("planes")?;
    let [batch, kv_heads, tokens, _] = fixture.dims("k")?;
    let [_, q_heads, _] = fixture.dims("q")?;
    if planes > softhash::MAX_PLANES {
        return super::unfit(format!("{planes} planes per table, at most {} are supported", softhash::MAX_PLANES));
    }
    if !q_heads.is_multiple_of(kv_heads) {
        return super::unfit(format!("{q_heads} query heads do not divide among {kv_heads} kv heads"));
    }
    let kv = [batch, kv_heads, tokens, dim];
    let case = Case {
        fixture,
        planes,
        rows: &fixture.array("planes")?.data,
        q: &fixture.shaped("q", &[batch, q_heads, dim])?.data,
        k: &fixture.shaped("k", &kv)?.data,
        v: &fixture.shaped("v", &kv)?.data,
        batch,
        q_heads,
        kv_heads,
        dim,
        tokens,
        lengths: fixture.counts("lengths", &[batch], tokens)?,
        beta: fixture.scalar("beta")?,
        heavy: fixture.count("M", LIMIT)?,
        sink: fixture.count("sink", LIMIT)?,
        window: fixture.count("window", LIMIT)?,
    };
    if fixture.has(&["tau"]) {
        let beta = Temperature::Tau(fixture.scalar("tau")? as f32).beta(dim);
        report.push("beta of tau", "configuration", super::relative_error(&[f64::from(beta)], &[case.beta]), 1e-6);
    }
    by_reference(&case, report)?;
    by_device(device, &case, report)
}

impl Case<'_> {
    /// Rows of one kv head of one sequence, as far as they count.
    fn head<'b>(&self, data: &'b [f64], b: usize, kv_head: usize) -> Vec<&'b [f64]> {
        let start = (b * self.kv_heads + kv_head) * self.tokens * self.dim;
        data[start..].chunks_exact(self.dim).take(self.lengths[b]).collect()
    }

    fn tables(&self) -> usize {
        self.rows.len() / (self.planes * self.dim)
    }

    fn width(&self) -> usize {
        self.sink + self.window + self.heavy
    }

    /// An expected selection, its lengths checked against it.
    fn selection(&self, rule: &str) -> Result<Vec<f64>> {
        let (name, shape) = (format!("sel_{rule}"), [self.batch, self.q_heads, self.width()]);
        let indices = &self.fixture.shaped(&name, &shape)?.data;
        let lens = self.fixture.counts(&format!("{name}_len"), &shape[..2], self.width())?;
        let counted = indices.chunks(self.width().max(1)).map(|row| row.iter().filter(|&&j| j >= 0.0).count());
        if !counted.eq(lens) {
            return super::unfit(format!("{name} and {name}_len disagree"));
        }
        Ok(indices.clone())
    }

    fn output(&self, name: &str) -> Result<&super::Array> {
        self.fixture.shaped(name, &[self.batch, self.q_heads, self.dim])
    }
}

fn by_reference(case: &Case<'_>, report: &mut Report<'_>) -> Result<()> {
    let scale = 1.0 / (case.dim as f64).sqrt();
    let (tables, width) = (case.tables(), case.width());
    let mut codes = vec![0.0; case.batch * case.kv_heads * case.tokens * tables];
    let mut scores = vec![0.0; case.batch * case.q_heads * case.tokens];
    let mut weighted = scores.clone();
    let (mut norms, mut expected_norms) = (Vec::new(), Vec::new());
    let stored_norms = &case.fixture.shaped("vnorm", &[case.batch, case.kv_heads, case.tokens])?.data;
    let mut selected = [Vec::new(), Vec::new()];
    let mut outputs = [Vec::new(), Vec::new(), Vec::new()];
    for b in 0..case.batch {
        for h in 0..case.q_heads {
            let kv_head = h / (case.q_heads / case.kv_heads);
            let (keys, values) = (case.head(case.k, b, kv_head), case.head(case.v, b, kv_head));
            let q = &case.q[(b * case.q_heads + h) * case.dim..][..case.dim];
            let phi = math::soft_hash(&math::project(case.rows, q), case.planes, case.beta);
            let row = (b * case.q_heads + h) * case.tokens;
            let kv_row = (b * case.kv_heads + kv_head) * case.tokens;
            for (j, (key, value)) in keys.iter().zip(&values).enumerate() {
                let key_codes = math::codes(&math::project(case.rows, key), case.planes);
                scores[row + j] = math::soft_collision(&phi, &key_codes);
                weighted[row + j] = math::norm(value) * scores[row + j];
                norms.push(math::norm(value));
                expected_norms.push(stored_norms[kv_row + j]);
                for (l, code) in key_codes.into_iter().enumerate() {
                    codes[(kv_row + j) * tables + l] = code as f64;
                }
            }
            let rated = &weighted[row..row + keys.len()];
            let mut sets: Vec<Vec<usize>> = [Rule::Union, Rule::Disjoint]
                .into_iter()
                .map(|rule| math::select(rated, rule, case.sink, case.window, case.heavy))
                .collect();
            for (out, set) in selected.iter_mut().zip(&sets) {
                out.extend((0..width).map(|i| set.get(i).map_or(-1.0, |&j| j as f64)));
            }
            sets.push((0..keys.len()).collect());
            for (out, set) in outputs.iter_mut().zip(&sets) {
                out.extend(math::attend(q, &keys, &values, set, scale, case.dim).0);
            }
        }
    }
    let fixture = case.fixture;
    let rows = [case.batch, case.q_heads, case.tokens];
    let code_shape = [case.batch, case.kv_heads, case.tokens, tables];
    report.reference_exact("codes", &codes, &fixture.shaped("codes", &code_shape)?.data);
    let stored = super::Array { data: expected_norms, ..fixture.array("vnorm")?.clone() };
    report.reference("vnorm", &norms, &stored);
    report.reference("scores", &weighted, fixture.shaped("scores", &rows)?);
    report.reference("scores_no_vnorm", &scores, fixture.shaped("scores_no_vnorm", &rows)?);
    for (rule, got) in ["union", "disjoint"].iter().zip(&selected) {
        report.reference_exact(&format!("sel_{rule}"), got, &case.selection(rule)?);
    }
    for (name, got) in ["out_union", "out_disjoint", "out_dense"].iter().zip(&outputs) {
        report.reference(name, got, case.output(name)?);
    }
    Ok(())
}

fn by_device(device: &Device, case: &Case<'_>, report: &mut Report<'_>) -> Result<()> {
    let fixture = case.fixture;
    let step = Step {
        device,
        q: case.q,
        k: case.k,
        v: case.v,
        num_q_heads: case.q_heads,
        num_kv_heads: case.kv_heads,
        head_dim: case.dim,
        dtype: step::cache_dtype(fixture.array("k")?, fixture.array("v")?)?,
        lengths: &case.lengths,
        tokens: case.tokens,
    };
    let every_key = step::config(case.tables(), case.planes, case.beta, case.rows, case.tokens);
    let weighted = SocketConfig { value_norm: true, ..every_key.clone() };

    for (name, config) in [("scores", &weighted), ("scores_no_vnorm", &every_key)] {
        let got = step.run(config.clone(), Mode::Sparse)?.dense_scores(case.tokens)?;
        report.device_scores(name, &got, &fixture.array(name)?.data);
    }

    // On a plane of zeros every key and query fall into bucket 1, so a key's score is its weight alone.
    let config = step::config(1, 1, case.beta, &vec![0.0; case.dim], case.tokens);
    let config = SocketConfig { scoring: Scoring::HardCollision, value_norm: true, ..config };
    let got = step.run(config, Mode::Sparse)?.dense_scores(case.tokens)?;
    let stored_norms = &fixture.array("vnorm")?.data;
    let mut want = vec![0.0; got.len()];
    for (row, want) in want.chunks_exact_mut(case.tokens).enumerate() {
        let (b, kv_head) = (row / case.q_heads, row % case.q_heads / (case.q_heads / case.kv_heads));
        let start = (b * case.kv_heads + kv_head) * case.tokens;
        want[..case.lengths[b]].copy_from_slice(&stored_norms[start..start + case.lengths[b]]);
    }
    report.device_scores("vnorm", &got, &want);

    for (name, rule) in [("union", Rule::Union), ("disjoint", Rule::Disjoint)] {
        let (sink, window) = (case.sink, case.window);
        let config = SocketConfig { budget: Budget::Tokens(case.heavy), rule, sink, window, ..weighted.clone() };
        let answer = step.run(config, Mode::Sparse)?;
        report.device_exact(&format!("sel_{name}"), &answer.padded_indices(case.width()), &case.selection(name)?);
        let name = format!("out_{name}");
        report.device(&name, &answer.o, &case.output(&name)?.data, OUTPUT_BOUND);
    }
    let dense = step.run(every_key, Mode::Dense)?;
    report.device("out_dense", &dense.o, &case.output("out_dense")?.data, OUTPUT_BOUND);
    Ok(())
}
