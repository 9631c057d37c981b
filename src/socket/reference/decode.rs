//! All stages together, for one sequence.

use super::{
    attend, codes, dot, group_mean, hamming, hard_collision, head_rows, heavy, mean_of_first, norm, normalized,
    project, select, sign_gain, sign_projection, soft_collision, soft_hash,
};
use crate::error::{Error, Result};
use crate::socket::config::{CacheShape, Scoring, SelectionScope, SocketConfig};

/// One sequence and the queries of its last tokens.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// What to compute.
    pub config: &'a SocketConfig,
    /// Head counts and dimensions.
    pub shape: CacheShape,
    /// `[tables * planes, head_dim]`, or one such set per kv head; see [`crate::Hyperplanes::rows`].
    pub planes: &'a [f64],
    /// `[query tokens, num_q_heads, head_dim]`; the query tokens are the last of the sequence.
    pub q: &'a [f64],
    /// `[len, num_kv_heads, head_dim]`.
    pub k: &'a [f64],
    /// `[len, num_kv_heads, value_dim]`.
    pub v: &'a [f64],
    /// Logit scale.
    pub scale: f64,
}

/// The selection of one query token for one head, or for one group of heads.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Attended keys, ascending.
    pub selected: Vec<usize>,
    /// Score of every visible key; all 0 where the keys are not hashed yet.
    pub scores: Vec<f64>,
}

/// What [`decode`] computes.
#[derive(Clone, Debug, PartialEq)]
pub struct Decoded {
    /// `[query tokens, num_q_heads, value_dim]`.
    pub o: Vec<f64>,
    /// `[query tokens, num_q_heads]`, natural log.
    pub lse: Vec<f64>,
    /// `[query tokens, heads]`, heads as in [`crate::Selection::indices`].
    pub rows: Vec<Row>,
}

/// The keys and values of one kv head with their index.
struct Head<'a> {
    config: &'a SocketConfig,
    planes: &'a [f64],
    keys: Vec<&'a [f64]>,
    values: Vec<&'a [f64]>,
    /// Zero without centring; absent while it is awaited.
    mean: Option<Vec<f64>>,
    /// `[keys][bits]`, of the centred keys.
    projections: Vec<Vec<f64>>,
    /// Of the centred keys.
    gains: Vec<f64>,
}

impl<'a> Head<'a> {
    fn new(problem: &Problem<'a>, kv_head: usize) -> Self {
        let Problem { config, shape, planes, .. } = *problem;
        let one = config.tables * config.planes * shape.head_dim;
        let set = if planes.len() == one { 0 } else { kv_head };
        let planes = &planes[set * one..(set + 1) * one];
        let keys = head_rows(problem.k, shape.num_kv_heads, shape.head_dim, kv_head);
        let values = head_rows(problem.v, shape.num_kv_heads, shape.value_dim, kv_head);
        let mean = match config.center {
            Some(count) => mean_of_first(&keys, count),
            None => Some(vec![0.0; shape.head_dim]),
        };
        let (mut projections, mut gains) = (Vec::new(), Vec::new());
        if let Some(mean) = &mean {
            for key in &keys {
                let centred: Vec<f64> = key.iter().zip(mean).map(|(k, m)| k - m).collect();
                let projected = project(planes, &centred);
                gains.push(sign_gain(&centred, &projected));
                projections.push(projected);
            }
        }
        Self { config, planes, keys, values, mean, projections, gains }
    }

    /// Scores of the first `visible` keys for one query; zeros while the mean is awaited.
    fn scores(&self, q: &[f64], visible: usize, scale: f64) -> Vec<f64> {
        let config = self.config;
        let Some(mean) = &self.mean else { return vec![0.0; visible] };
        let q = if config.normalize_query { normalized(q) } else { q.to_vec() };
        let query = project(self.planes, &q);
        let phi = match config.scoring {
            Scoring::SoftCollision => {
                let beta = config.temperature.beta(q.len());
                soft_hash(&query, config.planes, f64::from(beta))
            }
            _ => Vec::new(),
        };
        let score = |j: usize| {
            let key = &self.projections[j];
            let value_norm = if config.value_norm { norm(self.values[j]) } else { 1.0 };
            match config.scoring {
                Scoring::SoftCollision => value_norm * soft_collision(&phi, &codes(key, config.planes)),
                Scoring::HardCollision => {
                    value_norm * hard_collision(&codes(&query, config.planes), &codes(key, config.planes))
                }
                Scoring::Hamming => value_norm * hamming(&query, key),
                Scoring::SignProjection => {
                    scale * sign_projection(dot(&q, mean), &query, key, self.gains[j]) + value_norm.ln()
                }
            }
        };
        (0..visible).map(score).collect()
    }

    fn select(&self, scores: Vec<f64>) -> Row {
        let n = scores.len();
        let config = self.config;
        let selected = match self.mean {
            Some(_) => select(&scores, config.rule, config.sink, config.window, heavy(config, n)),
            None => (0..n).collect(),
        };
        Row { selected, scores }
    }
}

/// Sparse attention of one sequence: index, scores, selection and exact attention over the selected keys.
///
/// # Errors
/// [`Error::Config`] as [`SocketConfig::validate`] and [`CacheShape::validate`]; [`Error::Shape`] where a slice's
/// length does not fit.
pub fn decode(problem: &Problem<'_>) -> Result<Decoded> {
    let (tokens, len) = check(problem)?;
    let Problem { config, shape, q, scale, .. } = *problem;
    let heads: Vec<Head<'_>> = (0..shape.num_kv_heads).map(|h| Head::new(problem, h)).collect();
    let mut result = Decoded { o: Vec::new(), lse: Vec::new(), rows: Vec::new() };
    for t in 0..tokens {
        let visible = (len + t + 1).saturating_sub(tokens);
        for (kv_head, head) in heads.iter().enumerate() {
            let first = t * shape.num_q_heads + kv_head * shape.group();
            let queries: Vec<&[f64]> = q.chunks_exact(shape.head_dim).skip(first).take(shape.group()).collect();
            let scores: Vec<_> = queries.iter().map(|q| head.scores(q, visible, scale)).collect();
            let rows: Vec<Row> = match config.scope {
                SelectionScope::PerHead => scores.into_iter().map(|s| head.select(s)).collect(),
                SelectionScope::PerGroup => vec![head.select(group_mean(&scores))],
            };
            for (g, q) in queries.iter().enumerate() {
                let selected = &rows[g % rows.len()].selected;
                let (o, lse) = attend(q, &head.keys, &head.values, selected, scale, shape.value_dim);
                result.o.extend(o);
                result.lse.push(lse);
            }
            result.rows.extend(rows);
        }
    }
    Ok(result)
}

/// Checks the problem; returns its number of query tokens and of keys.
fn check(problem: &Problem<'_>) -> Result<(usize, usize)> {
    let Problem { config, shape, planes, q, k, v, .. } = *problem;
    config.validate()?;
    shape.validate()?;
    let refuse = |tensor, data: &[f64], expected: String| {
        Err(Error::Shape { op: "reference decode", tensor, got: vec![data.len()], expected })
    };
    let one = config.tables * config.planes * shape.head_dim;
    if planes.len() != one && planes.len() != one * shape.num_kv_heads {
        return refuse("planes", planes, format!("{one} values, or {one} for each kv head"));
    }
    let token = shape.num_q_heads * shape.head_dim;
    if !q.len().is_multiple_of(token) {
        return refuse("q", q, format!("a multiple of {token} values"));
    }
    let token = shape.num_kv_heads * shape.head_dim;
    if !k.len().is_multiple_of(token) {
        return refuse("k", k, format!("a multiple of {token} values"));
    }
    let len = k.len() / token;
    let values = len * shape.num_kv_heads * shape.value_dim;
    if v.len() != values {
        return refuse("v", v, format!("{values} values"));
    }
    Ok((q.len() / (shape.num_q_heads * shape.head_dim), len))
}
