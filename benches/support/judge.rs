//! No time is reported of a wrong result.

use super::data::Problem;
use super::outcome::{Outcome, Wrong};
use softhash::{DecodeOptions, Mode, SocketCache};
use std::collections::HashSet;

/// Checks the first and the last head of every sequence; returns how many (token, kv head) pairs are attended in all.
pub fn check(cache: &mut SocketCache, problem: &mut Problem, options: &DecodeOptions) -> Outcome<usize> {
    let sparse = options.mode == Mode::Sparse;
    let options = DecodeOptions { selection: sparse, output: Some(softhash::DType::F32), ..*options };
    let result = cache.decode_with(&problem.query(), &options)?;
    let o = result.o.read_blocking()?.to_f32();
    let mut lists: Vec<Vec<usize>> = Vec::new();
    if let Some(selection) = &result.selection {
        let indices = selection.indices.read_blocking()?;
        let width = indices.shape()[3];
        let rows = indices.to_i32();
        lists = rows.chunks(width).map(|r| r.iter().filter(|&&i| i >= 0).map(|&i| i as usize).collect()).collect();
    }
    let (batch, dim) = (problem.lens.len(), problem.head_dim);
    // Selections of one sequence.
    let rows = lists.len() / batch;
    for sequence in 0..batch {
        let keys = problem.lens[sequence];
        let lists = &lists[sequence * rows..][..rows];
        for list in lists {
            if !list.windows(2).all(|w| w[0] < w[1]) {
                return Err(Wrong("a selection is not strictly ascending".into()).into());
            }
            if list.len() * 66 < keys.min(256) {
                return Err(Wrong(format!("a selection is too short, {} of {keys} keys", list.len())).into());
            }
        }
        for head in [0, problem.q_heads - 1] {
            let expected = match rows {
                0 => problem.attend_all(sequence, head),
                n => problem.attend(sequence, head, &lists[head * n / problem.q_heads]),
            };
            let found = &o[(sequence * problem.q_heads + head) * dim..][..dim];
            let norm = expected.iter().map(|x| x * x).sum::<f64>().sqrt();
            let error = expected.iter().zip(found).map(|(a, b)| (a - f64::from(*b)).powi(2)).sum::<f64>().sqrt() / norm;
            // So that NaN does not pass.
            let right = error < 2e-5;
            if !right {
                return Err(Wrong(format!("head {head} of {keys} keys is off by {error:.1e}")).into());
            }
        }
    }
    let per_kv = rows / problem.kv_heads;
    let union = |lists: &[Vec<usize>]| lists.iter().flatten().copied().collect::<HashSet<_>>().len();
    let all = problem.lens.iter().sum::<usize>() * problem.kv_heads;
    Ok(if per_kv == 0 { all } else { lists.chunks(per_kv).map(union).sum() })
}
