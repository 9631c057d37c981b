//! A token's bucket weights, and their derivative.

use crate::socket::reference::{project, soft_hash};

/// φ(x): `[tables, 2^planes_per_table]`; each table's weights sum to 1.
pub fn features(planes: &[f64], planes_per_table: usize, beta: f64, x: &[f64]) -> Vec<f64> {
    soft_hash(&project(planes, x), planes_per_table, beta)
}

/// What [`features_backward`] gives for one token.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct HashGradient {
    /// `[head_dim]`.
    pub dx: Vec<f64>,
    /// As `planes`.
    pub dplanes: Vec<f64>,
    /// Of β.
    pub dbeta: f64,
}

/// Gradient of a loss through [`features`], given its gradient `dphi` with respect to φ(x).
///
/// φ_r = Π_p σ(2·β·t_p·c_rp) with t = tanh(u), u = w·x and the corner signs c, so ∂ln φ_r/∂(β·t_p) = c_rp − m_p,
/// where m_p = tanh(β·t_p) is the mean of c_rp under φ.
pub fn features_backward(planes: &[f64], planes_per_table: usize, beta: f64, x: &[f64], dphi: &[f64]) -> HashGradient {
    let u = project(planes, x);
    let phi = soft_hash(&u, planes_per_table, beta);
    let buckets = 1 << planes_per_table;
    let mut out = HashGradient { dx: vec![0.0; x.len()], dplanes: vec![0.0; planes.len()], dbeta: 0.0 };
    for (plane, row) in planes.chunks_exact(x.len()).enumerate() {
        let (table, p) = (plane / planes_per_table, plane % planes_per_table);
        let t = u[plane].tanh();
        let m = (beta * t).tanh();
        let corner = |r: usize| if r >> (planes_per_table - 1 - p) & 1 == 1 { 1.0 } else { -1.0 };
        let first = table * buckets;
        let s: f64 = (0..buckets).map(|r| (corner(r) - m) * dphi[first + r] * phi[first + r]).sum();
        out.dbeta += t * s;
        let du = beta * s * (1.0 - t * t);
        for (c, w) in row.iter().enumerate() {
            out.dx[c] += du * w;
            out.dplanes[plane * x.len() + c] += du * x[c];
        }
    }
    out
}
