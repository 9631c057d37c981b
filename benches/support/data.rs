//! Keys and values of any length without holding them: every element is a function of its place.

use half::bf16;
use rayon::prelude::*;
use softhash::{CacheShape, DType, Mode, SocketCache, SocketConfig, TensorView};
use std::time::Instant;

/// Tokens generated and appended at a time.
const CHUNK: usize = 1 << 16;

pub struct Problem {
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub keys: usize,
    query: Vec<bf16>,
}

/// Bytes that must move at least, by part.
pub struct Bytes {
    pub step: u64,
    pub score: u64,
    pub attend: u64,
    pub append: u64,
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

impl Problem {
    pub fn new(q_heads: usize, kv_heads: usize, head_dim: usize, keys: usize) -> Self {
        let query = (0..q_heads * head_dim).map(|i| element(1, i as u64)).collect();
        Self { q_heads, kv_heads, head_dim, keys, query }
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

    pub fn query(&self) -> TensorView<'_> {
        TensorView::bf16(&self.query, [1, 1, self.q_heads, self.head_dim])
    }

    #[cfg(feature = "cuda")]
    pub fn query_elements(&self) -> &[bf16] {
        &self.query
    }

    pub fn query_row(&self, head: usize) -> Vec<f64> {
        self.query[head * self.head_dim..][..self.head_dim].iter().map(|x| x.to_f64()).collect()
    }

    /// Row of a key (stream 2) or value (stream 3).
    pub fn row(&self, stream: u64, token: usize, head: usize) -> impl Iterator<Item = f64> + '_ {
        let at = (token * self.kv_heads + head) * self.head_dim;
        (0..self.head_dim).map(move |d| element(stream, (at + d) as u64).to_f64())
    }

    /// Appends all keys; seconds of each full chunk's append, finished and waited for.
    pub fn fill(&self, cache: &mut SocketCache) -> Vec<f64> {
        let mut times = Vec::new();
        let row = self.kv_heads * self.head_dim;
        for start in (0..self.keys).step_by(CHUNK) {
            let tokens = CHUNK.min(self.keys - start);
            let make = |stream| -> Vec<bf16> {
                (0..tokens * row).into_par_iter().map(|i| element(stream, (start * row + i) as u64)).collect()
            };
            let (k, v) = (make(2), make(3));
            let shape = [1, tokens, self.kv_heads, self.head_dim];
            let begin = Instant::now();
            cache.append(&TensorView::bf16(&k, shape), &TensorView::bf16(&v, shape)).unwrap();
            cache.non_finite_seen().unwrap();
            if tokens == CHUNK {
                times.push(begin.elapsed().as_secs_f64());
            }
        }
        times
    }

    pub fn bytes(&self, config: &SocketConfig, mode: Mode, selected: usize) -> Bytes {
        let row = (2 * self.head_dim * 2) as u64;
        let rows = (self.keys * self.kv_heads) as u64;
        let tables_per_word = 32 / config.planes;
        let scalars = usize::from(config.value_norm) + usize::from(config.scoring == softhash::Scoring::SignProjection);
        let index = ((config.tables.div_ceil(tables_per_word) + scalars) * 4) as u64;
        let append = CHUNK as u64 * self.kv_heads as u64 * (2 * row + index);
        match mode {
            Mode::Dense => Bytes { step: rows * row, score: 0, attend: rows * row, append },
            _ => {
                let (score, attend) = (rows * index, selected as u64 * row);
                Bytes { step: score + attend, score, attend, append }
            }
        }
    }
}
