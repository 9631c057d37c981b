//! Hyperplanes to sign bits and to soft bucket weights.

use super::{dot, norm};

/// `w · x` for each row `w` of `planes` (`[bits, dim]`, `dim` the length of `x`): `[bits]`.
pub fn project(planes: &[f64], x: &[f64]) -> Vec<f64> {
    planes.chunks_exact(x.len()).map(|w| dot(w, x)).collect()
}

/// Hard hash: for each table Σ_p bit(p)·2^(planes−1−p), bit = projection ≥ 0. `[tables]`, each below `2^planes`.
pub fn codes(projections: &[f64], planes: usize) -> Vec<usize> {
    let code = |table: &[f64]| table.iter().fold(0, |code, &u| 2 * code + usize::from(u >= 0.0));
    projections.chunks_exact(planes).map(code).collect()
}

/// Corner sign of plane `p` in bucket `r`: −1 or +1.
fn corner(r: usize, p: usize, planes: usize) -> f64 {
    if r >> (planes - 1 - p) & 1 == 1 { 1.0 } else { -1.0 }
}

/// Soft hash, factorised: φ\[l\]\[r\] = Π_p σ(2·β·tanh(u_lp)·c_rp) with the logistic function σ and the corner signs c.
/// `[tables, 2^planes]`; each table's weights sum to 1.
pub fn soft_hash(projections: &[f64], planes: usize, beta: f64) -> Vec<f64> {
    let mut phi = Vec::new();
    for table in projections.chunks_exact(planes) {
        for r in 0..1 << planes {
            let factor = |(p, u): (usize, &f64)| 1.0 / (1.0 + (-2.0 * beta * u.tanh() * corner(r, p, planes)).exp());
            phi.push(table.iter().enumerate().map(factor).product());
        }
    }
    phi
}

/// Soft hash by its definition, a softmax over the corners of Σ_p β·tanh(u_lp)·c_rp: what [`soft_hash`] must equal.
pub fn soft_hash_by_corners(projections: &[f64], planes: usize, beta: f64) -> Vec<f64> {
    let mut phi = Vec::new();
    for table in projections.chunks_exact(planes) {
        let logit = |r| table.iter().enumerate().map(|(p, u)| beta * u.tanh() * corner(r, p, planes)).sum::<f64>();
        let logits: Vec<f64> = (0..1 << planes).map(logit).collect();
        let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let weights: Vec<f64> = logits.iter().map(|x| (x - largest).exp()).collect();
        let sum: f64 = weights.iter().sum();
        phi.extend(weights.iter().map(|w| w / sum));
    }
    phi
}

/// x / ‖x‖; a zero vector stays zero.
pub fn normalized(x: &[f64]) -> Vec<f64> {
    let length = norm(x);
    x.iter().map(|x| if length > 0.0 { x / length } else { 0.0 }).collect()
}

/// Mean of the first `count` keys, `[dim]`; `None` where there are fewer, or none at all.
pub fn mean_of_first(keys: &[&[f64]], count: usize) -> Option<Vec<f64>> {
    let first = keys.get(..count).filter(|first| !first.is_empty())?;
    let mut mean = vec![0.0; first[0].len()];
    for key in first {
        mean.iter_mut().zip(*key).for_each(|(m, x)| *m += x);
    }
    mean.iter_mut().for_each(|m| *m /= count as f64);
    Some(mean)
}
