//! How a query rates a key, one function per scoring.

use super::dot;

/// ‖x‖₂.
pub fn norm(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

/// Σ_l φ\[l\]\[code_l\]: the weights that the query's soft hash `phi` (`[tables, buckets]`) gives to the key's buckets
/// (`[tables]`).
pub fn soft_collision(phi: &[f64], key_codes: &[usize]) -> f64 {
    let buckets = phi.len() / key_codes.len();
    key_codes.iter().enumerate().map(|(l, code)| phi[l * buckets + code]).sum()
}

/// Number of tables in which query and key share a bucket.
pub fn hard_collision(query_codes: &[usize], key_codes: &[usize]) -> f64 {
    query_codes.iter().zip(key_codes).filter(|(q, k)| q == k).count() as f64
}

/// Number of hyperplanes that have query and key on the same side, from their projections.
pub fn hamming(query: &[f64], key: &[f64]) -> f64 {
    query.iter().zip(key).filter(|(q, k)| (**q >= 0.0) == (**k >= 0.0)).count() as f64
}

/// The scale a = ‖x‖² / Σ_i |w_i·x| that makes Σ_i ±w_i an estimate of the (centred) key x; 0 for a zero key.
pub fn sign_gain(key: &[f64], key_projections: &[f64]) -> f64 {
    let sum: f64 = key_projections.iter().map(|u| u.abs()).sum();
    if sum > 0.0 { dot(key, key) / sum } else { 0.0 }
}

/// One-bit estimate of q·k, not yet scaled: q·μ + a·Σ_i (w_i·q)·sign(w_i·(k − μ)), from the projections of the query
/// and of the centred key, and its gain a.
pub fn sign_projection(query_dot_mean: f64, query: &[f64], key: &[f64], gain: f64) -> f64 {
    let sum: f64 = query.iter().zip(key).map(|(q, k)| if *k >= 0.0 { *q } else { -*q }).sum();
    query_dot_mean + gain * sum
}
