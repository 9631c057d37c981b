//! `extra_signlinear_*`: sign projection of one kv head, centred on the mean of all keys.

use super::fixture::{Fixture, Result};
use super::step::{self, Step};
use super::{Report, unfit};
use softhash::socket::reference as math;
use softhash::{Budget, Device, Mode, Rule, Scoring, SocketConfig};

const OUTPUT_BOUND: f64 = 1e-5;
const LIMIT: usize = 1 << 24;

pub fn judge(device: &Device, case: &Fixture, report: &mut Report<'_>) -> Result<()> {
    let [bits, dim] = case.dims("planes")?;
    let [heads, _] = case.dims("q")?;
    let [tokens, _] = case.dims("k")?;
    if !bits.is_multiple_of(8) {
        return unfit(format!("{bits} planes, expected a multiple of 8"));
    }
    let rows = &case.array("planes")?.data;
    let q = &case.shaped("q", &[heads, dim])?.data;
    let (k, v) = (case.shaped("k", &[tokens, dim])?, case.shaped("v", &[tokens, dim])?);
    let keys: Vec<&[f64]> = k.data.chunks_exact(dim).collect();
    let values: Vec<&[f64]> = v.data.chunks_exact(dim).collect();
    let stored_mean = &case.shaped("mu", &[dim])?.data;
    let tail_value = &case.shaped("vbar", &[dim])?.data;
    let (heavy, sink, window) = (case.count("M", LIMIT)?, case.count("sink", LIMIT)?, case.count("window", LIMIT)?);
    let width = sink + window + heavy;
    let packed = case.shaped("bits", &[tokens, bits / 8])?;
    let gains = case.shaped("scale", &[tokens])?;
    let logits = case.shaped("est_logits", &[heads, tokens])?;
    let variances = case.shaped("est_var", &[heads, tokens])?;
    let selected = case.shaped("selected", &[heads, width])?;
    let masses = case.shaped("tail_mass", &[heads])?;
    let output = |name| case.shaped(name, &[heads, dim]);
    let scale = 1.0 / (dim as f64).sqrt();

    let mean = math::mean_of_first(&keys, tokens).unwrap_or_default();
    report.reference("mu", &mean, case.array("mu")?);
    report.reference("vbar", &math::mean_of_first(&values, tokens).unwrap_or_default(), case.array("vbar")?);
    let centred: Vec<Vec<f64>> =
        keys.iter().map(|key| key.iter().zip(stored_mean).map(|(k, m)| k - m).collect()).collect();
    let projections: Vec<Vec<f64>> = centred.iter().map(|key| math::project(rows, key)).collect();
    let bytes: Vec<f64> = projections.iter().flat_map(|u| math::codes(u, 8)).map(|byte| byte as f64).collect();
    report.reference_exact("bits", &bytes, &packed.data);
    let got_gains: Vec<f64> = centred.iter().zip(&projections).map(|(x, u)| math::sign_gain(x, u)).collect();
    report.reference("scale", &got_gains, gains);

    let (mut got_logits, mut got_variances, mut got_selected) = (Vec::new(), Vec::new(), Vec::new());
    let (mut got_masses, mut got_outputs) = (Vec::new(), [Vec::new(), Vec::new(), Vec::new()]);
    for q in q.chunks_exact(dim) {
        let query = math::project(rows, q);
        let offset = math::dot(q, stored_mean);
        let estimate = |j: usize| scale * math::sign_projection(offset, &query, &projections[j], got_gains[j]);
        let estimates: Vec<f64> = (0..tokens).map(estimate).collect();
        let variances: Vec<f64> = (0..tokens).map(|j| math::sign_variance(q, &centred[j], &projections[j])).collect();
        let set = math::select(&estimates, Rule::Disjoint, sink, window, heavy);
        let unselected = (0..tokens).filter(|j| set.binary_search(j).is_err());
        let mass: f64 = unselected.map(|j| (estimates[j] - variances[j] / 2.0).exp()).sum();
        let (o, lse) = math::attend(q, &keys, &values, &set, scale, dim);
        let all: Vec<usize> = (0..tokens).collect();
        got_outputs[1].extend(math::attend_with_tail(&o, lse, mass, tail_value).0);
        got_outputs[2].extend(math::attend(q, &keys, &values, &all, scale, dim).0);
        got_outputs[0].extend(o);
        got_selected.extend((0..width).map(|i| set.get(i).map_or(-1.0, |&j| j as f64)));
        got_masses.push(mass);
        got_logits.extend(estimates);
        got_variances.extend(variances);
    }
    report.reference("est_logits", &got_logits, logits);
    report.reference("est_var", &got_variances, variances);
    report.reference("tail_mass", &got_masses, masses);
    report.reference_exact("selected", &got_selected, &selected.data);
    for (name, got) in ["out_selected_only", "out_tail_corrected", "out_dense"].iter().zip(&got_outputs) {
        report.reference(name, got, output(name)?);
    }

    let step = Step {
        device,
        q,
        k: &k.data,
        v: &v.data,
        num_q_heads: heads,
        num_kv_heads: 1,
        head_dim: dim,
        dtype: step::cache_dtype(k, v)?,
        lengths: &[tokens],
        tokens,
    };
    let every_key = SocketConfig {
        scoring: Scoring::SignProjection,
        center: Some(tokens),
        ..step::config(bits / 8, 8, 1.0, rows, tokens)
    };
    let got = step.run(every_key.clone(), Mode::Sparse)?.dense_scores(tokens)?;
    report.device_scores("est_logits", &got, &logits.data);
    let config = SocketConfig { budget: Budget::Tokens(heavy), sink, window, ..every_key.clone() };
    let answer = step.run(config, Mode::Sparse)?;
    report.device_exact("selected", &answer.padded_indices(width), &selected.data);
    report.device("out_selected_only", &answer.o, &output("out_selected_only")?.data, OUTPUT_BOUND);
    let dense = step.run(every_key, Mode::Dense)?;
    report.device("out_dense", &dense.o, &output("out_dense")?.data, OUTPUT_BOUND);
    Ok(())
}
