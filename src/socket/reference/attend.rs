//! Exact attention over a set of keys.

use super::{dot, head_rows};
use crate::socket::config::CacheShape;

/// Softmax attention of one query over the keys `selected`: o = Σ_j softmax_j(scale·q·k_j)·v_j, and the natural log of
/// the sum of the exponentiated logits. An empty set gives o = 0 and −∞. `value_dim` is the length of o.
pub fn attend(
    q: &[f64],
    keys: &[&[f64]],
    values: &[&[f64]],
    selected: &[usize],
    scale: f64,
    value_dim: usize,
) -> (Vec<f64>, f64) {
    let logits: Vec<f64> = selected.iter().map(|&j| scale * dot(q, keys[j])).collect();
    let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let mut o = vec![0.0; value_dim];
    if largest == f64::NEG_INFINITY {
        return (o, f64::NEG_INFINITY);
    }
    let lse = largest + logits.iter().map(|x| (x - largest).exp()).sum::<f64>().ln();
    for (&j, logit) in selected.iter().zip(&logits) {
        let weight = (logit - lse).exp();
        o.iter_mut().zip(values[j]).for_each(|(o, v)| *o += weight * v);
    }
    (o, lse)
}

/// Merges the attention over two disjoint key sets: lse = ln(e^lse₁ + e^lse₂), o = e^(lse₁−lse)·o₁ + e^(lse₂−lse)·o₂.
pub fn merge(o1: &[f64], lse1: f64, o2: &[f64], lse2: f64) -> (Vec<f64>, f64) {
    let largest = lse1.max(lse2);
    if largest == f64::NEG_INFINITY {
        return (vec![0.0; o1.len()], largest);
    }
    let lse = largest + ((lse1 - largest).exp() + (lse2 - largest).exp()).ln();
    let (w1, w2) = ((lse1 - lse).exp(), (lse2 - lse).exp());
    (o1.iter().zip(o2).map(|(a, b)| w1 * a + w2 * b).collect(), lse)
}

/// Exact attention of the last query tokens of one sequence to every key up to their own position: dense decoding, and
/// prefill where there are as many query tokens as keys.
///
/// q `[tokens, num_q_heads, head_dim]`, k `[len, num_kv_heads, head_dim]`, v `[len, num_kv_heads, value_dim]`. Returns
/// o `[tokens, num_q_heads, value_dim]` and lse `[tokens, num_q_heads]`.
pub fn causal(shape: CacheShape, q: &[f64], k: &[f64], v: &[f64], scale: f64) -> (Vec<f64>, Vec<f64>) {
    let len = k.len() / (shape.num_kv_heads * shape.head_dim);
    let tokens = q.len() / (shape.num_q_heads * shape.head_dim);
    let (mut o, mut lse) = (Vec::new(), Vec::new());
    for (row, q) in q.chunks_exact(shape.head_dim).enumerate() {
        let (t, h) = (row / shape.num_q_heads, row % shape.num_q_heads);
        let kv_head = h / shape.group();
        let keys = head_rows(k, shape.num_kv_heads, shape.head_dim, kv_head);
        let values = head_rows(v, shape.num_kv_heads, shape.value_dim, kv_head);
        let visible: Vec<usize> = (0..(len + t + 1).saturating_sub(tokens)).collect();
        let (row_o, row_lse) = attend(q, &keys, &values, &visible, scale, shape.value_dim);
        o.extend(row_o);
        lse.push(row_lse);
    }
    (o, lse)
}
