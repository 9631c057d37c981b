//! Exact attention in f64 from the host's own copy of keys and values, and how near a result comes to it.

use half::bf16;
use rayon::prelude::*;

use crate::synthetic::Stream;

/// Exact attention of one query head.
pub struct Truth {
    /// Its kv head.
    kv_head: usize,
    /// Softmax weight of each visible key.
    weights: Vec<f64>,
    /// `[head_dim]`.
    output: Vec<f64>,
}

/// How near one result comes to the truth.
#[derive(Clone, Copy, Debug, Default)]
pub struct Nearness {
    /// Share of the true heavy keys that was selected.
    pub recall: f64,
    /// Attention weight of the selected keys.
    pub mass: f64,
    /// ‖o − truth‖ / ‖truth‖.
    pub error: f64,
}

impl Nearness {
    /// The mean of each figure.
    pub fn mean(all: &[Self]) -> Self {
        let of = |figure: fn(&Self) -> f64| all.iter().map(figure).sum::<f64>() / all.len().max(1) as f64;
        Self { recall: of(|n| n.recall), mass: of(|n| n.mass), error: of(|n| n.error) }
    }
}

/// Exact attention of `q`, `[q_heads, head_dim]`, over the first `visible` tokens; one entry per query head.
pub fn attend(stream: &Stream, visible: usize, q: &[bf16]) -> Vec<Truth> {
    let shape = stream.shape;
    let (dim, kv_heads) = (shape.head_dim, shape.kv_heads);
    let group = shape.q_heads / kv_heads;
    let rows = q.par_chunks(dim).enumerate();
    rows.map(|(h, q)| {
        let kv_head = h / group;
        let q: Vec<f64> = q.iter().map(|x| x.to_f64()).collect();
        let logit = |t| {
            let k = row(stream, &stream.k, t, kv_head);
            k.iter().zip(&q).map(|(k, q)| k.to_f64() * q).sum::<f64>() / (dim as f64).sqrt()
        };
        let logits: Vec<f64> = (0..visible).map(logit).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut weights: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= total);
        let mut truth = Truth { kv_head, weights, output: Vec::new() };
        truth.output = truth.output_over(stream, 0..visible);
        truth
    })
    .collect()
}

/// The channels of token `t` in `of`, keys or values.
fn row<'a>(stream: &Stream, of: &'a [bf16], t: usize, kv_head: usize) -> &'a [bf16] {
    let start = (t * stream.shape.kv_heads + kv_head) * stream.shape.head_dim;
    &of[start..start + stream.shape.head_dim]
}

impl Truth {
    /// Exact attention over `keys` alone.
    pub fn output_over(&self, stream: &Stream, keys: impl Iterator<Item = usize>) -> Vec<f64> {
        let mut output = vec![0.0; stream.shape.head_dim];
        let mut mass = 0.0;
        for t in keys {
            let w = self.weights[t];
            mass += w;
            let v = row(stream, &stream.v, t, self.kv_head);
            output.iter_mut().zip(v).for_each(|(o, v)| *o += w * v.to_f64());
        }
        output.iter_mut().for_each(|o| *o /= mass);
        output
    }

    /// The `count` keys of most weight in `range`, heaviest first.
    pub fn heavy(&self, range: std::ops::Range<usize>, count: usize) -> Vec<usize> {
        let mut keys: Vec<usize> = range.filter(|&t| t < self.weights.len()).collect();
        keys.sort_by(|&a, &b| self.weights[b].total_cmp(&self.weights[a]).then(a.cmp(&b)));
        keys.truncate(count);
        keys
    }

    /// Compares output `o` and the `selected` keys, ascending, with the truth and its `heavy` keys.
    pub fn compare(&self, o: &[f64], selected: &[usize], heavy: &[usize]) -> Nearness {
        let found = heavy.iter().filter(|t| selected.binary_search(t).is_ok()).count();
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut o.iter().zip(&self.output).map(|(o, t)| o - t));
        Nearness {
            recall: found as f64 / heavy.len().max(1) as f64,
            mass: selected.iter().filter_map(|&t| self.weights.get(t)).sum(),
            error: error / norm(&mut self.output.iter().copied()),
        }
    }
}
