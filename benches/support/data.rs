//! Keys and values of any length without holding them: every element is a function of its place.

use half::bf16;
use rayon::prelude::*;
use softhash::{CacheShape, DType, SocketCache, Tensor, TensorView};
use std::collections::HashMap;
use std::ops::Range;
use std::time::Instant;

/// Tokens generated and appended at a time.
pub const CHUNK: usize = 1 << 16;

/// One layer's step: a query token for each of some sequences.
pub struct Problem {
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Keys of each sequence.
    pub lens: Vec<usize>,
    query: Vec<bf16>,
    /// Dense attention by (sequence, head) over the first so many keys, the shortest first.
    dense: HashMap<(usize, usize), Vec<(usize, Partial)>>,
}

fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58476d1ce4e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d049bb133111eb);
    x ^ (x >> 31)
}

/// About normal: the sum of four uniform numbers.
fn element(stream: u64, index: u64) -> bf16 {
    let x = mix(index.wrapping_mul(0x9e3779b97f4a7c15) ^ stream.wrapping_mul(0xd1342543de82ef95));
    let sum: u32 = (0..4).map(|i| ((x >> (16 * i)) & 0xffff) as u32).sum();
    bf16::from_f32((sum as f32 / 65535.0 - 2.0) * 1.7)
}

/// Softmax attention over some keys: the largest logit, the sum of weights relative to it, and the weighted values.
#[derive(Clone)]
struct Partial {
    peak: f64,
    sum: f64,
    o: Vec<f64>,
}

impl Partial {
    fn merge(mut self, other: Self) -> Self {
        let peak = self.peak.max(other.peak);
        let scale = |from: f64| if from == peak { 1.0 } else { (from - peak).exp() };
        let (a, b) = (scale(self.peak), scale(other.peak));
        self.o.iter_mut().zip(&other.o).for_each(|(x, y)| *x = *x * a + y * b);
        Self { peak, sum: self.sum * a + other.sum * b, o: self.o }
    }

    fn output(&self) -> Vec<f64> {
        self.o.iter().map(|x| x / self.sum).collect()
    }
}

impl Problem {
    pub fn new(q_heads: usize, kv_heads: usize, head_dim: usize, keys: usize) -> Self {
        Self::ragged(q_heads, kv_heads, head_dim, vec![keys])
    }

    pub fn ragged(q_heads: usize, kv_heads: usize, head_dim: usize, lens: Vec<usize>) -> Self {
        let query = (0..lens.len() * q_heads * head_dim).map(|i| element(1, i as u64)).collect();
        Self { q_heads, kv_heads, head_dim, lens, query, dense: HashMap::new() }
    }

    /// Keys of the longest sequence.
    pub fn keys(&self) -> usize {
        self.lens.iter().copied().max().unwrap_or(0)
    }

    pub fn shape(&self) -> CacheShape {
        CacheShape {
            num_q_heads: self.q_heads,
            num_kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            value_dim: self.head_dim,
            dtype: DType::Bf16,
        }
    }

    fn query_shape(&self) -> [usize; 4] {
        [self.lens.len(), 1, self.q_heads, self.head_dim]
    }

    pub fn query(&self) -> TensorView<'_> {
        TensorView::bf16(&self.query, self.query_shape())
    }

    pub fn query_tensor(&self) -> softhash::Result<Tensor> {
        Tensor::from_bf16(self.query.clone(), self.query_shape())
    }

    /// Keys and values of some tokens of a sequence.
    pub fn keys_values(&self, sequence: usize, tokens: Range<usize>) -> softhash::Result<[Tensor; 2]> {
        let (row, first) = (self.kv_heads * self.head_dim, self.place(sequence, tokens.start, 0));
        let make = |stream| -> Vec<bf16> {
            (0..tokens.len() * row).into_par_iter().map(|i| element(stream, first + i as u64)).collect()
        };
        let shape = [1, tokens.len(), self.kv_heads, self.head_dim];
        Ok([Tensor::from_bf16(make(2), shape)?, Tensor::from_bf16(make(3), shape)?])
    }

    /// Appends all keys from the host; seconds of each full chunk's append, finished and waited for.
    pub fn fill(&self, cache: &mut SocketCache) -> Vec<f64> {
        let mut times = Vec::new();
        for (sequence, &len) in self.lens.iter().enumerate() {
            for start in (0..len).step_by(CHUNK) {
                let tokens = CHUNK.min(len - start);
                let [k, v] = self.keys_values(sequence, start..start + tokens).unwrap();
                let begin = Instant::now();
                cache.append_to(sequence, &k.view().unwrap(), &v.view().unwrap()).unwrap();
                cache.non_finite_seen().unwrap();
                if tokens == CHUNK {
                    times.push(begin.elapsed().as_secs_f64());
                }
            }
        }
        times
    }

    /// Index of the first element of a row; sequences lie far apart.
    fn place(&self, sequence: usize, token: usize, kv_head: usize) -> u64 {
        let token = ((sequence as u64) << 24) + token as u64;
        (token * self.kv_heads as u64 + kv_head as u64) * self.head_dim as u64
    }

    fn attention(
        &self,
        sequence: usize,
        head: usize,
        tokens: impl IndexedParallelIterator<Item = usize>,
    ) -> Option<Partial> {
        let q = &self.query[(sequence * self.q_heads + head) * self.head_dim..][..self.head_dim];
        let (kv_head, scale) = (head * self.kv_heads / self.q_heads, 1.0 / (self.head_dim as f64).sqrt());
        let row = |stream, token| {
            let at = self.place(sequence, token, kv_head);
            (0..self.head_dim as u64).map(move |d| element(stream, at + d).to_f64())
        };
        let add = |part: Option<Partial>, token| {
            let logit: f64 = row(2, token).zip(q).map(|(k, q)| k * q.to_f64()).sum::<f64>() * scale;
            let Some(mut part) = part else {
                return Some(Partial { peak: logit, sum: 1.0, o: row(3, token).collect() });
            };
            let top = logit.max(part.peak);
            let (keep, weight) = ((part.peak - top).exp(), (logit - top).exp());
            (part.peak, part.sum) = (top, part.sum * keep + weight);
            part.o.iter_mut().zip(row(3, token)).for_each(|(o, v)| *o = *o * keep + weight * v);
            Some(part)
        };
        let merge = |a: Option<Partial>, b: Option<Partial>| match (a, b) {
            (Some(a), Some(b)) => Some(a.merge(b)),
            (a, b) => a.or(b),
        };
        tokens.with_min_len(1024).fold(|| None, add).reduce(|| None, merge)
    }

    /// Softmax attention of one head over `tokens`.
    pub fn attend(&self, sequence: usize, head: usize, tokens: &[usize]) -> Vec<f64> {
        let part = self.attention(sequence, head, tokens.par_iter().copied());
        part.map_or(vec![0.0; self.head_dim], |part| part.output())
    }

    /// Softmax attention of one head over all keys, going on from what was computed of fewer.
    pub fn attend_all(&mut self, sequence: usize, head: usize) -> Vec<f64> {
        let len = self.lens[sequence];
        let known = self.dense.get(&(sequence, head)).into_iter().flatten();
        let known = known.filter(|(keys, _)| *keys <= len).max_by_key(|(keys, _)| *keys).cloned();
        let (from, known) = known.map_or((0, None), |(keys, part)| (keys, Some(part)));
        let part = match (known, self.attention(sequence, head, (from..len).into_par_iter())) {
            (Some(known), Some(more)) => known.merge(more),
            (Some(part), None) | (None, Some(part)) => part,
            (None, None) => return vec![0.0; self.head_dim],
        };
        let output = part.output();
        if from < len {
            self.dense.entry((sequence, head)).or_default().push((len, part));
        }
        output
    }
}
