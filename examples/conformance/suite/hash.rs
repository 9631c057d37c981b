//! `hash_*`: hard codes and soft hash.
//!
//! A device shows neither, but both follow from its scores. With one table, a key in bucket r has score φ\[r\] under
//! soft collision, and 1 or 0 under hard collision as it shares the query's bucket or not. One key per bucket, solved
//! for from the planes, so brings out the whole φ; keys and queries taken from x bring out the codes.

use super::fixture::{Fixture, Result, unfit};
use super::{Report, step};
use softhash::socket::reference as math;
use softhash::{DType, Device, Mode, Scoring, SocketConfig};

pub fn judge(device: &Device, case: &Fixture, report: &mut Report<'_>) -> Result<()> {
    let [tables, planes, dim] = case.dims("planes")?;
    if planes > softhash::MAX_PLANES {
        return unfit(format!("{planes} planes per table, at most {} are supported", softhash::MAX_PLANES));
    }
    let buckets = 1 << planes;
    let [n, _] = case.dims("x")?;
    let x = &case.shaped("x", &[n, dim])?.data;
    let codes = case.counts("codes", &[n, tables], buckets - 1)?;
    let phi = case.shaped("phi", &[n, tables, buckets])?;
    let rows = &case.array("planes")?.data;
    let beta = case.scalar("beta")?;

    let (mut ref_codes, mut ref_phi, mut ref_corners) = (Vec::new(), Vec::new(), Vec::new());
    for x in x.chunks_exact(dim) {
        let projections = math::project(rows, x);
        ref_codes.extend(math::codes(&projections, planes));
        ref_phi.extend(math::soft_hash(&projections, planes, beta));
        ref_corners.extend(math::soft_hash_by_corners(&projections, planes, beta));
    }
    report.reference_exact("codes", &as_f64(&ref_codes), &as_f64(&codes));
    report.reference("phi", &ref_phi, phi);
    report.reference("phi by corners", &ref_corners, phi);

    let mut device_phi = vec![0.0; phi.data.len()];
    let (mut device_matches, mut matches) = (Vec::new(), Vec::new());
    for (l, table) in rows.chunks_exact(planes * dim).enumerate() {
        let config = step::config(1, planes, beta, table, buckets.max(n));
        let corners = corner_keys(table, planes, dim)?;
        let scores = scores(device, config.clone(), x, &corners, dim)?;
        for (i, row) in scores.chunks_exact(buckets).enumerate() {
            device_phi[(i * tables + l) * buckets..][..buckets].copy_from_slice(row);
        }
        // The queries are keys of the expected buckets: score 1 at its own key says that the key's code is right.
        let expected: Vec<f64> = (0..n).flat_map(|i| &corners[codes[i * tables + l] * dim..][..dim]).copied().collect();
        let hard = SocketConfig { scoring: Scoring::HardCollision, ..config };
        device_matches.extend(self::scores(device, hard, &expected, x, dim)?);
        for i in 0..n {
            matches.extend((0..n).map(|j| f64::from(codes[i * tables + l] == codes[j * tables + l])));
        }
    }
    report.device_scores("phi", &device_phi, &phi.data);
    report.device_exact("codes", &device_matches, &matches);
    Ok(())
}

/// Scores of all `keys` for all `queries`, each a list of rows of `dim`.
fn scores(device: &Device, config: SocketConfig, queries: &[f64], keys: &[f64], dim: usize) -> Result<Vec<f64>> {
    let tokens = keys.len() / dim;
    let step = step::Step {
        device,
        q: queries,
        k: keys,
        v: &vec![1.0; keys.len()],
        num_q_heads: queries.len() / dim,
        num_kv_heads: 1,
        head_dim: dim,
        dtype: DType::F32,
        lengths: &[tokens],
        tokens,
    };
    step.run(config, Mode::Sparse)?.dense_scores(tokens)
}

/// For each bucket a key whose projections on the planes are ±1 with the bucket's signs: `[2^planes, dim]`.
fn corner_keys(table: &[f64], planes: usize, dim: usize) -> Result<Vec<f64>> {
    let rows: Vec<&[f64]> = table.chunks_exact(dim).collect();
    let mut keys = Vec::new();
    for r in 0..1usize << planes {
        let signs = (0..planes).map(|p| if r >> (planes - 1 - p) & 1 == 1 { 1.0 } else { -1.0 });
        // The key of least norm is a sum of planes; its coefficients solve Gram · c = signs.
        let mut system: Vec<Vec<f64>> = rows.iter().map(|a| rows.iter().map(|b| math::dot(a, b)).collect()).collect();
        system.iter_mut().zip(signs).for_each(|(row, sign)| row.push(sign));
        let Some(coefficients) = solve(system) else {
            return unfit("the planes of a table are linearly dependent: not every bucket can be reached");
        };
        let channel = |d: usize| rows.iter().zip(&coefficients).map(|(row, c)| c * row[d]).sum::<f64>();
        keys.extend((0..dim).map(channel));
    }
    Ok(keys)
}

/// Solves a square system whose last column is the right-hand side; `None` where it is singular.
fn solve(mut system: Vec<Vec<f64>>) -> Option<Vec<f64>> {
    let n = system.len();
    for i in 0..n {
        let pivot = (i..n).max_by(|&a, &b| system[a][i].abs().total_cmp(&system[b][i].abs()))?;
        system.swap(i, pivot);
        let top = system[i].clone();
        if top[i].abs() < 1e-9 {
            return None;
        }
        for (_, row) in system.iter_mut().enumerate().filter(|(r, _)| *r != i) {
            let factor = row[i] / top[i];
            row.iter_mut().zip(&top).for_each(|(x, t)| *x -= factor * t);
        }
    }
    Some((0..n).map(|i| system[i][n] / system[i][i]).collect())
}

fn as_f64(x: &[usize]) -> Vec<f64> {
    x.iter().map(|&x| x as f64).collect()
}
