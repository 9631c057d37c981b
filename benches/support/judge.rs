//! No time is reported of a wrong result.

use super::data::Problem;
use softhash::{DecodeOptions, Mode, SocketCache};
use std::collections::BTreeSet;

/// Softmax attention of one head over `tokens`.
fn attention(problem: &Problem, head: usize, tokens: impl Iterator<Item = usize>) -> Vec<f64> {
    let kv_head = head * problem.kv_heads / problem.q_heads;
    let q = problem.query_row(head);
    let scale = 1.0 / (problem.head_dim as f64).sqrt();
    let (mut peak, mut sum, mut o) = (f64::NEG_INFINITY, 0.0, vec![0.0; problem.head_dim]);
    for token in tokens {
        let logit: f64 = problem.row(2, token, kv_head).zip(&q).map(|(k, q)| k * q).sum::<f64>() * scale;
        let top = logit.max(peak);
        let (keep, weight) = ((peak - top).exp(), (logit - top).exp());
        (peak, sum) = (top, sum * keep + weight);
        o.iter_mut().zip(problem.row(3, token, kv_head)).for_each(|(o, v)| *o = *o * keep + weight * v);
    }
    o.into_iter().map(|x| x / sum).collect()
}

/// Checks the first and the last head; returns how many (token, kv head) pairs are attended in all.
pub fn check(cache: &mut SocketCache, problem: &Problem, options: &DecodeOptions) -> usize {
    let sparse = options.mode == Mode::Sparse;
    let options = DecodeOptions { selection: sparse, output: Some(softhash::DType::F32), ..*options };
    let result = cache.decode_with(&problem.query(), &options).unwrap();
    let o = result.o.read_blocking().unwrap().to_f32();
    let mut lists: Vec<Vec<usize>> = Vec::new();
    if let Some(selection) = &result.selection {
        let indices = selection.indices.read_blocking().unwrap();
        let width = indices.shape()[3];
        let rows = indices.to_i32();
        lists = rows.chunks(width).map(|r| r.iter().filter(|&&i| i >= 0).map(|&i| i as usize).collect()).collect();
        for list in &lists {
            assert!(list.windows(2).all(|w| w[0] < w[1]), "a selection is not strictly ascending");
            assert!(list.len() * 66 >= problem.keys.min(256), "a selection is too short: {}", list.len());
        }
    }
    for head in [0, problem.q_heads - 1] {
        let expected = match lists.len() {
            0 => attention(problem, head, 0..problem.keys),
            n => attention(problem, head, lists[head * n / problem.q_heads].iter().copied()),
        };
        let found = &o[head * problem.head_dim..][..problem.head_dim];
        let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
        let error = expected.iter().zip(found).map(|(a, b)| (a - f64::from(*b)).powi(2)).sum::<f64>().sqrt() / norm;
        assert!(error < 2e-5, "head {head} of {} keys is off by {error:.1e}: no times are taken", problem.keys);
    }
    let per_kv = lists.len() / problem.kv_heads;
    let union = |lists: &[Vec<usize>]| lists.iter().flatten().copied().collect::<BTreeSet<_>>().len();
    if per_kv == 0 { problem.keys * problem.kv_heads } else { lists.chunks(per_kv).map(union).sum() }
}
