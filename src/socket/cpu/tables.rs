//! A query's look-up tables: `[table][digit][16]`, digits of four bits, lowest first (see [`BitLayout`]).

use crate::lsh::BitLayout;
use crate::socket::config::{Scoring, SocketConfig};
use crate::socket::cpu::append::{Projection, project};

/// Divides by the norm; a zero row stays zero.
pub(crate) fn normalize(row: &mut [f32]) {
    let norm = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
    if norm > 0.0 {
        row.iter_mut().for_each(|x| *x = (f64::from(*x) / norm) as f32);
    }
}

/// Tables of the query rows `[n][dk]` of one kv head, `[n][table][digit][16]`.
pub(crate) fn build(config: &SocketConfig, projection: &Projection, kv_head: usize, q: &[f32]) -> Vec<f32> {
    let layout = config.layout();
    let beta = config.temperature.beta(projection.head_dim());
    let projected = project(projection, kv_head, q);
    let mut tables = vec![0.0; projected.len() / projection.columns * layout.entries()];
    for (out, u) in tables.chunks_exact_mut(layout.entries()).zip(projected.chunks_exact(projection.columns)) {
        fill(config.scoring, layout, beta, u, out);
    }
    tables
}

/// Fills the tables of one query from its projections, which lie in the order of packed bits.
fn fill(scoring: Scoring, layout: BitLayout, beta: f32, u: &[f32], out: &mut [f32]) {
    let per_table = layout.digits() * BitLayout::DIGIT;
    for (l, table) in out.chunks_exact_mut(per_table).enumerate() {
        // The code's least significant bit is its last plane.
        let (word, lowest) = layout.position(l, layout.planes - 1);
        let code = &u[word * 32 + lowest..][..layout.planes];
        for (digit, bits) in table.chunks_exact_mut(BitLayout::DIGIT).zip(code.chunks(4)) {
            digit[0] = if scoring.multiplies() { 1.0 } else { 0.0 };
            let mut filled = 1;
            for &u in bits {
                let (clear, set) = weights(scoring, beta, u);
                for i in 0..filled {
                    let below = digit[i];
                    (digit[i], digit[i + filled]) =
                        if scoring.multiplies() { (below * clear, below * set) } else { (below + clear, below + set) };
                }
                filled *= 2;
            }
            // The scorer does not mask the next code's bits out of a short top digit: whatever they are, they find
            // the same entries again.
            for i in filled..BitLayout::DIGIT {
                digit[i] = digit[i % filled];
            }
        }
    }
}

/// What a clear and a set key bit contribute, given the query's projection.
fn weights(scoring: Scoring, beta: f32, u: f32) -> (f32, f32) {
    match scoring {
        Scoring::SoftCollision => {
            // Logistic of ∓2t by the side whose exponential cannot overflow.
            let t = beta * u.tanh();
            let small = (-2.0 * t.abs()).exp();
            let (unlike, like) = (small / (1.0 + small), 1.0 / (1.0 + small));
            if t >= 0.0 { (unlike, like) } else { (like, unlike) }
        }
        Scoring::SignProjection => (-u, u),
        Scoring::HardCollision | Scoring::Hamming => {
            if u >= 0.0 {
                (0.0, 1.0)
            } else {
                (1.0, 0.0)
            }
        }
    }
}
