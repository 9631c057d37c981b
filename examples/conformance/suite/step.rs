//! One decoding step through the public API.

use super::fixture::{Array, Failure, Result, unfit};
use half::{bf16, f16};
use softhash::{
    Budget, CacheShape, DType, DecodeOptions, Device, Hyperplanes, Mode, Rule, Scoring, SelectionScope, SocketCache,
    SocketConfig, Temperature, TensorView,
};

/// A step's inputs as fixtures lay them out: heads before tokens.
pub struct Step<'a> {
    pub device: &'a Device,
    /// `[batch, num_q_heads, head_dim]`.
    pub q: &'a [f64],
    /// `[batch, num_kv_heads, tokens, head_dim]`.
    pub k: &'a [f64],
    /// `[batch, num_kv_heads, tokens, head_dim]`.
    pub v: &'a [f64],
    pub num_q_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
    /// Element type of k and v.
    pub dtype: DType,
    /// Tokens that count, per sequence.
    pub lengths: &'a [usize],
    /// Tokens there is room for in k and v.
    pub tokens: usize,
}

/// What a step gives, widened.
pub struct Answer {
    /// `[batch, num_q_heads, head_dim]`.
    pub o: Vec<f64>,
    /// `[batch * num_q_heads]`: index and score of each selected key, in the order returned.
    pub selected: Vec<Vec<(usize, f64)>>,
}

impl Answer {
    /// Scores at their keys' places, 0 elsewhere: `[batch, num_q_heads, tokens]`.
    pub fn dense_scores(&self, tokens: usize) -> Result<Vec<f64>> {
        let mut scores = vec![0.0; self.selected.len() * tokens];
        for (row, (index, score)) in self.selected.iter().enumerate().flat_map(|(r, s)| s.iter().map(move |x| (r, x))) {
            match scores[row * tokens..(row + 1) * tokens].get_mut(*index) {
                Some(place) => *place = *score,
                None => return unfit(format!("a selected index of {index} among {tokens} tokens")),
            }
        }
        Ok(scores)
    }

    /// Indices padded with −1 to `width`, longer rows kept as they are.
    pub fn padded_indices(&self, width: usize) -> Vec<f64> {
        let pad = |row: &Vec<(usize, f64)>| {
            let mut row: Vec<f64> = row.iter().map(|&(j, _)| j as f64).collect();
            row.resize(width.max(row.len()), -1.0);
            row
        };
        self.selected.iter().flat_map(pad).collect()
    }
}

/// Configuration that scores every key by soft collision, without weight, and keeps up to `keys` of them.
pub fn config(tables: usize, planes: usize, beta: f64, hyperplanes: &[f64], keys: usize) -> SocketConfig {
    SocketConfig {
        tables,
        planes,
        temperature: Temperature::Beta(beta as f32),
        budget: Budget::Tokens(keys),
        rule: Rule::Disjoint,
        sink: 0,
        window: 0,
        value_norm: false,
        scope: SelectionScope::PerHead,
        scoring: Scoring::SoftCollision,
        hyperplanes: Hyperplanes::Supplied(hyperplanes.iter().map(|&x| x as f32).collect()),
        normalize_query: false,
        center: None,
    }
}

/// The dtype to cache k and v in: the one they are stored in.
pub fn cache_dtype(k: &Array, v: &Array) -> Result<DType> {
    match (k.dtype, v.dtype) {
        (Some(k), Some(v)) if k == v => Ok(k),
        _ => unfit("k and v must both be F32, F16 or BF16"),
    }
}

impl Step<'_> {
    /// Runs the step in a fresh cache, with the selection where the mode makes one.
    pub fn run(&self, config: SocketConfig, mode: Mode) -> Result<Answer> {
        let shape = CacheShape {
            num_q_heads: self.num_q_heads,
            num_kv_heads: self.num_kv_heads,
            head_dim: self.head_dim,
            value_dim: self.head_dim,
            dtype: self.dtype,
        };
        let batch = self.lengths.len();
        let mut cache = SocketCache::new(self.device, config, shape, batch)?;
        let dims = [batch, self.tokens, self.num_kv_heads, self.head_dim];
        let (k, v) = (self.tokens_first(self.k), self.tokens_first(self.v));
        match self.dtype {
            DType::F16 => {
                let (k, v) = (narrow(&k, f16::from_f64), narrow(&v, f16::from_f64));
                cache.append_ragged(&TensorView::f16(&k, dims), &TensorView::f16(&v, dims), self.lengths)?;
            }
            DType::Bf16 => {
                let (k, v) = (narrow(&k, bf16::from_f64), narrow(&v, bf16::from_f64));
                cache.append_ragged(&TensorView::bf16(&k, dims), &TensorView::bf16(&v, dims), self.lengths)?;
            }
            DType::F32 => {
                let (k, v) = (narrow(&k, |x| x as f32), narrow(&v, |x| x as f32));
                cache.append_ragged(&TensorView::f32(&k, dims), &TensorView::f32(&v, dims), self.lengths)?;
            }
            DType::I32 => return unfit("k and v are integers"),
        }
        let q = narrow(self.q, |x| x as f32);
        let q = TensorView::f32(&q, [batch, 1, self.num_q_heads, self.head_dim]);
        let options = DecodeOptions { mode, selection: mode == Mode::Sparse, ..Default::default() };
        let attended = cache.decode_with(&q, &options)?;
        let o = attended.o.read_blocking()?.to_f32().into_iter().map(f64::from).collect();
        let mut selected = Vec::new();
        if let Some(selection) = attended.selection {
            let indices = selection.indices.read_blocking()?;
            let scores = selection.scores.read_blocking()?.to_f32();
            let width = indices.shape().last().copied().unwrap_or(0).max(1);
            for (indices, scores) in indices.to_i32().chunks(width).zip(scores.chunks(width)) {
                let pairs = indices.iter().zip(scores);
                selected.push(
                    pairs.filter_map(|(&j, &s)| usize::try_from(j).ok().map(|j| (j, f64::from(s)))).collect::<Vec<_>>(),
                );
            }
        } else if mode == Mode::Sparse {
            let why = "no selection was returned though it was asked for".into();
            return Err(Failure::Library(softhash::Error::Unsupported { op: "decode", why }));
        }
        Ok(Answer { o, selected })
    }

    /// `[batch, head, token, channel]` as `[batch, token, head, channel]`.
    fn tokens_first(&self, x: &[f64]) -> Vec<f64> {
        let (heads, tokens, dim) = (self.num_kv_heads, self.tokens, self.head_dim);
        let mut y = Vec::with_capacity(x.len());
        for batch in x.chunks_exact(heads * tokens * dim) {
            for t in 0..tokens {
                for h in 0..heads {
                    let row = (h * tokens + t) * dim;
                    y.extend_from_slice(&batch[row..row + dim]);
                }
            }
        }
        y
    }
}

fn narrow<T>(x: &[f64], to: impl Fn(f64) -> T) -> Vec<T> {
    x.iter().map(|&x| to(x)).collect()
}
