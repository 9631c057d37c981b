//! Tail correction: what the keys that were not selected would have added, estimated from their scores. A research
//! option that no executor offers; kept with the formulas because the fixtures pin it.

use super::dot;

/// Variance of the scaled logit that [`super::sign_projection`] estimates at scale 1/√dim with `bits` orthogonal
/// planes of norm √dim: ‖q‖²‖x‖²(‖x‖²·dim·bits/(Σ|w·x|)² − 1)/dim², x the centred key.
pub fn sign_variance(q: &[f64], key: &[f64], key_projections: &[f64]) -> f64 {
    let (dim, bits) = (q.len() as f64, key_projections.len() as f64);
    let length = dot(key, key);
    let sum: f64 = key_projections.iter().map(|u| u.abs()).sum();
    if sum == 0.0 {
        return 0.0;
    }
    dot(q, q) * length * (length * dim * bits / (sum * sum) - 1.0) / (dim * dim)
}

/// Adds a mass `tail` (in units of e^logit) that sits on the value `tail_value` to the attention (o, lse).
pub fn attend_with_tail(o: &[f64], lse: f64, tail: f64, tail_value: &[f64]) -> (Vec<f64>, f64) {
    super::merge(o, lse, tail_value, tail.ln())
}
