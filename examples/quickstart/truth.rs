//! Exact attention in f64 from the host's own copy of keys and values, and how near a result comes to it.

use half::bf16;
use rayon::prelude::*;

use crate::synthetic::Stream;

/// Exact attention of one query head.
pub struct Truth {
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

/// Exact attention of `q`, `[q_heads, head_dim]`, over the first `visible` tokens; one entry per query head.
pub fn attend(stream: &Stream, visible: usize, q: &[bf16]) -> Vec<Truth> {
    let shape = stream.shape;
    let (dim, kv_heads) = (shape.head_dim, shape.kv_heads);
    let group = shape.q_heads / kv_heads;
    let rows = q.par_chunks(dim).enumerate();
    rows.map(|(h, q)| {
        let row = |of: &'_ [bf16], t: usize| {
            let start = (t * kv_heads + h / group) * dim;
            start..(start + dim).min(of.len())
        };
        let q: Vec<f64> = q.iter().map(|x| x.to_f64()).collect();
        let logit = |t| {
            let k = &stream.k[row(&stream.k, t)];
            k.iter().zip(&q).map(|(k, q)| k.to_f64() * q).sum::<f64>() / (dim as f64).sqrt()
        };
        let logits: Vec<f64> = (0..visible).map(logit).collect();
        let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let mut weights: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
        let total: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|w| *w /= total);
        let mut output = vec![0.0; dim];
        for (t, w) in weights.iter().enumerate() {
            let v = &stream.v[row(&stream.v, t)];
            output.iter_mut().zip(v).for_each(|(o, v)| *o += w * v.to_f64());
        }
        Truth { weights, output }
    })
    .collect()
}

impl Truth {
    /// The `count` keys of most weight in `range`, heaviest first.
    pub fn heavy(&self, range: std::ops::Range<usize>, count: usize) -> Vec<usize> {
        let mut keys: Vec<usize> = range.filter(|&t| t < self.weights.len()).collect();
        keys.sort_by(|&a, &b| self.weights[b].total_cmp(&self.weights[a]).then(a.cmp(&b)));
        keys.truncate(count);
        keys
    }

    /// Compares output `o` and the `selected` keys, ascending, with the truth and its `heavy` keys.
    pub fn compare(&self, o: &[f32], selected: &[usize], heavy: &[usize]) -> Nearness {
        let found = heavy.iter().filter(|t| selected.binary_search(t).is_ok()).count();
        let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|x| x * x).sum::<f64>().sqrt();
        let error = norm(&mut o.iter().zip(&self.output).map(|(o, t)| f64::from(*o) - t));
        Nearness {
            recall: found as f64 / heavy.len().max(1) as f64,
            mass: selected.iter().filter_map(|&t| self.weights.get(t)).sum(),
            error: error / norm(&mut self.output.iter().copied()),
        }
    }
}
