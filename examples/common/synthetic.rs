//! A synthetic key, value and query stream with the structure that matters to hashing.
//!
//! What attention keys of language models have in common, and what this stream copies:
//!
//! * **a large common mean**: every key of a head carries the same vector of 80 % of the key's norm. Softmax does not
//!   see it, sign bits do;
//! * **low effective rank**: what differs between keys lies in 64 directions with a spectrum that falls off
//!   exponentially, of participation ratio about 30;
//! * **topics**: tokens come in runs (64 on average) of one of 64 topics, half of a key's variance is its topic;
//! * **needles**: a few tokens point where no other token does, and some queries look for just one of them;
//! * **a sink**: the first four tokens draw about a third of the attention and have almost no value;
//! * **uneven values**: ‖v‖ is log-normal with a spread of 25 %.
//!
//! The query heads of a group take turns at four kinds: a needle, the running topic, diffuse, and a mix of the first
//! two. All numbers follow from the seed.

use half::bf16;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};

const KEY_NORM: f32 = 16.0;
const MEAN_SHARE: f32 = 0.8;
const SPECTRUM_DECAY: f32 = 15.0;
const LATENT: usize = 64;
const TOPICS: usize = 64;
const RUN_LENGTH: u32 = 64;
const NEEDLES: usize = 8;
const SINK: usize = 4;
const VALUE_SPREAD: f32 = 0.25;
/// Parts of a query along the common mean and along the sink's direction.
const QUERY_ON_MEAN: f32 = 3.0;
const QUERY_ON_SINK: f32 = 9.6;

/// Heads and channels of a stream.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Query heads, a multiple of `kv_heads`.
    pub q_heads: usize,
    /// Key and value heads.
    pub kv_heads: usize,
    /// Channels of q, k and v; more than 66.
    pub head_dim: usize,
}

/// Keys and values of all tokens, and the means to draw queries for them.
pub struct Stream {
    /// Heads and channels.
    pub shape: Shape,
    /// `[tokens, kv_heads, head_dim]`.
    pub k: Vec<bf16>,
    /// `[tokens, kv_heads, head_dim]`.
    pub v: Vec<bf16>,
    heads: Vec<Head>,
    /// Topic of each token.
    topics: Vec<usize>,
    rng: ChaCha8Rng,
}

/// What is fixed for one kv head.
struct Head {
    /// Unit vectors: common mean, sink, then the latent directions.
    basis: Vec<Vec<f32>>,
    /// Latent coordinates of each topic.
    topics: Vec<Vec<f32>>,
    /// Mean value of each topic.
    topic_values: Vec<Vec<f32>>,
    /// Latent coordinates of each needle.
    needles: Vec<Vec<f32>>,
}

fn normals(rng: &mut ChaCha8Rng, n: usize) -> Vec<f32> {
    (0..n).map(|_| StandardNormal.sample(rng)).collect()
}

fn below(rng: &mut ChaCha8Rng, n: usize) -> usize {
    (rng.next_u64() % n as u64) as usize
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn add(to: &mut [f32], scale: f32, x: &[f32]) {
    to.iter_mut().zip(x).for_each(|(t, x)| *t += scale * x);
}

fn mix(a: f32, x: &[f32], b: f32, y: &[f32]) -> Vec<f32> {
    x.iter().zip(y).map(|(x, y)| a * x + b * y).collect()
}

impl Head {
    fn new(rng: &mut ChaCha8Rng, head_dim: usize) -> Self {
        let mut basis: Vec<Vec<f32>> = Vec::new();
        while basis.len() < LATENT + 2 {
            let mut row = normals(rng, head_dim);
            for other in &basis {
                let overlap = dot(&row, other);
                add(&mut row, -overlap, other);
            }
            let norm = dot(&row, &row).sqrt();
            row.iter_mut().for_each(|x| *x /= norm);
            basis.push(row);
        }
        let mut several = |n, len| (0..n).map(|_| normals(rng, len)).collect();
        Self {
            basis,
            topics: several(TOPICS, LATENT),
            topic_values: several(TOPICS, head_dim),
            needles: several(NEEDLES, LATENT),
        }
    }

    /// The vector with latent coordinates `z`; of norm 1 on average where `z` is standard normal.
    fn embed(&self, z: &[f32]) -> Vec<f32> {
        let spectrum = |i: usize| (-(i as f32) / SPECTRUM_DECAY).exp();
        let total: f32 = (0..LATENT).map(spectrum).sum();
        let mut x = vec![0.0; self.basis[0].len()];
        for (i, z) in z.iter().enumerate() {
            add(&mut x, z * (spectrum(i) / total).sqrt(), &self.basis[i + 2]);
        }
        x
    }

    fn key(&self, z: &[f32]) -> Vec<f32> {
        let mut k = self.embed(z);
        k.iter_mut().for_each(|x| *x *= KEY_NORM * (1.0 - MEAN_SHARE * MEAN_SHARE).sqrt());
        add(&mut k, KEY_NORM * MEAN_SHARE, &self.basis[0]);
        k
    }

    /// A query of `norm` along latent coordinates `z`, beside what all queries share.
    fn query(&self, z: &[f32], norm: f32) -> Vec<f32> {
        let mut q = self.embed(z);
        let scale = norm / dot(&q, &q).sqrt();
        q.iter_mut().for_each(|x| *x *= scale);
        add(&mut q, QUERY_ON_MEAN, &self.basis[0]);
        add(&mut q, QUERY_ON_SINK, &self.basis[1]);
        q
    }
}

impl Stream {
    /// Draws `tokens` tokens; calls `progress` with the number of tokens made since the last call.
    pub fn new(shape: Shape, tokens: usize, seed: u64, mut progress: impl FnMut(u64)) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let heads: Vec<Head> = (0..shape.kv_heads).map(|_| Head::new(&mut rng, shape.head_dim)).collect();
        // Needle `n` of every head sits at the same token, in the inner half, clear of any sink and window.
        let at: Vec<usize> = (0..NEEDLES).map(|_| tokens / 4 + below(&mut rng, (tokens / 2).max(1))).collect();
        let mut stream = Self { shape, k: Vec::new(), v: Vec::new(), heads, topics: Vec::new(), rng };
        let mut topic = 0;
        for t in 0..tokens {
            if stream.rng.next_u32().is_multiple_of(RUN_LENGTH) {
                topic = below(&mut stream.rng, TOPICS);
            }
            stream.push(t, topic, at.iter().position(|&n| n == t));
            if (t + 1) % 1024 == 0 {
                progress(1024);
            }
        }
        stream
    }

    fn push(&mut self, t: usize, topic: usize, needle: Option<usize>) {
        self.topics.push(topic);
        for head in &self.heads {
            let noise = normals(&mut self.rng, LATENT);
            let k = match needle {
                _ if t < SINK => head.basis[1].iter().map(|x| x * KEY_NORM).collect(),
                Some(n) => head.key(&mix(1.3, &head.needles[n], 0.1, &noise)),
                None => head.key(&mix(0.5f32.sqrt(), &head.topics[topic], 0.5f32.sqrt(), &noise)),
            };
            let spread: f32 = StandardNormal.sample(&mut self.rng);
            let size = if t < SINK { 0.05 } else { (VALUE_SPREAD * spread).exp() };
            let noise = normals(&mut self.rng, self.shape.head_dim);
            let v = mix(0.6 * size, &head.topic_values[topic], 0.8 * size, &noise);
            self.k.extend(k.into_iter().map(bf16::from_f32));
            self.v.extend(v.into_iter().map(bf16::from_f32));
        }
    }

    /// Draws the query of token `t`, `[q_heads, head_dim]`.
    pub fn query(&mut self, t: usize) -> Vec<bf16> {
        let group = self.shape.q_heads / self.shape.kv_heads;
        let topic = self.topics[t];
        let mut q = Vec::new();
        for h in 0..self.shape.q_heads {
            let head = &self.heads[h / group];
            let needle = &head.needles[below(&mut self.rng, NEEDLES)];
            let noise = normals(&mut self.rng, LATENT);
            let row = match h % 4 {
                0 => head.query(needle, 12.0),
                1 => head.query(&mix(1.0, &head.topics[topic], 0.5, &noise), 12.0),
                2 => head.query(&noise, 5.0),
                _ => head.query(&mix(1.0, needle, 1.0, &head.topics[topic]), 14.0),
            };
            q.extend(row.into_iter().map(bf16::from_f32));
        }
        q
    }
}
