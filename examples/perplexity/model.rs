//! A Llama decoder on the CPU whose attention runs through the library.

use std::path::Path;

use half::{bf16, f16};
use rayon::prelude::*;
use softhash::{CacheShape, DType, DecodeOptions, Mode, SocketCache, TensorView};

use crate::config::LlamaConfig;
use crate::linear::{Linear, rms_norm, silu_times, times_transposed};
use crate::weights::{Files, Weights};
use crate::{Result, fail};

/// Which of the library's attentions serves a chunk of tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// Exact, tiled for many tokens.
    Prefill,
    /// As in decoding: each token sees the keys up to its own position.
    Decode(Mode),
}

/// A loaded model.
pub struct Model {
    /// Its shapes.
    pub config: LlamaConfig,
    /// `[vocab, hidden]`.
    embedding: Vec<f32>,
    layers: Vec<Layer>,
    norm: Vec<f32>,
    /// `[vocab, hidden]`; empty where the embedding serves.
    head: Vec<f32>,
}

struct Layer {
    attention_norm: Vec<f32>,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    mlp_norm: Vec<f32>,
    gate: Linear,
    up: Linear,
    down: Linear,
}

/// Keys or values, `[tokens, kv_heads, head_dim]`, in the cache's element type.
pub enum Elements {
    /// Single precision.
    F32(Vec<f32>),
    /// Half precision.
    F16(Vec<f16>),
    /// bfloat16.
    Bf16(Vec<bf16>),
}

/// k and v of one layer for a stretch of tokens.
pub struct KeyValues {
    /// Keys, rotated.
    pub k: Elements,
    /// Values.
    pub v: Elements,
}

impl Elements {
    fn new(dtype: DType) -> Result<Self> {
        match dtype {
            DType::F32 => Ok(Self::F32(Vec::new())),
            DType::F16 => Ok(Self::F16(Vec::new())),
            DType::Bf16 => Ok(Self::Bf16(Vec::new())),
            DType::I32 => fail("keys and values cannot be I32"),
        }
    }

    fn extend(&mut self, x: &[f32]) {
        match self {
            Self::F32(e) => e.extend_from_slice(x),
            Self::F16(e) => e.extend(x.iter().map(|x| f16::from_f32(*x))),
            Self::Bf16(e) => e.extend(x.iter().map(|x| bf16::from_f32(*x))),
        }
    }

    /// A view of tokens `range`, each of `heads` heads with `dim` channels.
    fn view(&self, range: std::ops::Range<usize>, heads: usize, dim: usize) -> TensorView<'_> {
        let shape = [1, range.len(), heads, dim];
        let elements = range.start * heads * dim..range.end * heads * dim;
        match self {
            Self::F32(e) => TensorView::f32(&e[elements], shape),
            Self::F16(e) => TensorView::f16(&e[elements], shape),
            Self::Bf16(e) => TensorView::bf16(&e[elements], shape),
        }
    }
}

impl KeyValues {
    /// An empty stretch.
    pub fn new(dtype: DType) -> Result<Self> {
        Ok(Self { k: Elements::new(dtype)?, v: Elements::new(dtype)? })
    }

    fn push(&mut self, k: &[f32], v: &[f32]) {
        self.k.extend(k);
        self.v.extend(v);
    }

    /// Appends tokens `range` to a cache of one sequence.
    pub fn append_to(&self, cache: &mut SocketCache, range: std::ops::Range<usize>) -> softhash::Result<()> {
        let CacheShape { num_kv_heads, head_dim, value_dim, .. } = cache.shape();
        let k = self.k.view(range.clone(), num_kv_heads, head_dim);
        cache.append(&k, &self.v.view(range, num_kv_heads, value_dim))
    }
}

impl Layer {
    fn take(weights: &mut Weights<'_>, config: &LlamaConfig, index: usize) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let (q, kv) = (config.q_heads * config.head_dim, config.kv_heads * config.head_dim);
        let name = |part: &str| format!("model.layers.{index}.{part}");
        let mut linear = |part, outputs, inputs, bias| Linear::take(weights, &name(part), outputs, inputs, bias);
        let (bias, mlp_bias) = (config.attention_bias, config.mlp_bias);
        Ok(Self {
            q: linear("self_attn.q_proj", q, hidden, bias)?,
            k: linear("self_attn.k_proj", kv, hidden, bias)?,
            v: linear("self_attn.v_proj", kv, hidden, bias)?,
            o: linear("self_attn.o_proj", hidden, q, bias)?,
            gate: linear("mlp.gate_proj", inner, hidden, mlp_bias)?,
            up: linear("mlp.up_proj", inner, hidden, mlp_bias)?,
            down: linear("mlp.down_proj", hidden, inner, mlp_bias)?,
            attention_norm: weights.take(&name("input_layernorm.weight"), &[hidden])?,
            mlp_norm: weights.take(&name("post_attention_layernorm.weight"), &[hidden])?,
        })
    }
}

impl Model {
    /// Loads a model directory in Hugging Face layout.
    pub fn load(dir: &Path) -> Result<Self> {
        let config = LlamaConfig::read(dir)?;
        let files = Files::read(dir)?;
        let mut weights = files.tensors()?;
        let table = [config.vocab_size, config.hidden_size];
        let embedding = weights.take("model.embed_tokens.weight", &table)?;
        let layers = (0..config.layers).map(|i| Layer::take(&mut weights, &config, i)).collect::<Result<_>>()?;
        let norm = weights.take("model.norm.weight", &[config.hidden_size])?;
        let head = match config.tied {
            true => Vec::new(),
            false => weights.take("lm_head.weight", &table)?,
        };
        weights.finish(config.tied)?;
        Ok(Self { config, embedding, layers, norm, head })
    }

    /// Number of weights.
    pub fn parameters(&self) -> usize {
        let layer = |l: &Layer| {
            let linears = [&l.q, &l.k, &l.v, &l.o, &l.gate, &l.up, &l.down];
            linears.into_iter().map(Linear::parameters).sum::<usize>() + l.attention_norm.len() + l.mlp_norm.len()
        };
        self.embedding.len() + self.head.len() + self.norm.len() + self.layers.iter().map(layer).sum::<usize>()
    }

    /// Shape of one layer's cache.
    pub fn cache_shape(&self, dtype: DType) -> CacheShape {
        let c = &self.config;
        CacheShape {
            num_q_heads: c.q_heads,
            num_kv_heads: c.kv_heads,
            head_dim: c.head_dim,
            value_dim: c.head_dim,
            dtype,
        }
    }

    /// Runs `ids`, which follow the tokens that `caches` (one per layer) hold, and appends them there. Calls
    /// `progress` after each layer. Where `record` is given, k and v of each layer are added to it.
    ///
    /// Returns the residual stream behind the last layer, `[ids, hidden]`, if `want_hidden`; else the part of the last
    /// layer that only the output needs is left out.
    pub fn forward(
        &self,
        ids: &[u32],
        caches: &mut [SocketCache],
        attention: Attention,
        want_hidden: bool,
        mut record: Option<&mut [KeyValues]>,
        mut progress: impl FnMut(),
    ) -> Result<Vec<f32>> {
        let c = &self.config;
        let start = caches.first().and_then(|cache| cache.len(0)).unwrap_or(0);
        let mut x = self.embed(ids)?;
        for (i, (layer, cache)) in self.layers.iter().zip(caches).enumerate() {
            let normed = rms_norm(&x, &layer.attention_norm, c.rms_norm_eps);
            let mut k = layer.k.apply(&normed);
            rotate(&mut k, start, c.kv_heads, &c.frequencies);
            let v = layer.v.apply(&normed);
            let mut chunk = KeyValues::new(cache.shape().dtype)?;
            chunk.push(&k, &v);
            chunk.append_to(cache, 0..ids.len())?;
            if let Some(kept) = record.as_deref_mut().and_then(|r| r.get_mut(i)) {
                kept.push(&k, &v);
            }
            progress();
            if i + 1 == self.layers.len() && !want_hidden {
                return Ok(Vec::new());
            }

            let mut q = layer.q.apply(&normed);
            rotate(&mut q, start, c.q_heads, &c.frequencies);
            let q = TensorView::f32(&q, [1, ids.len(), c.q_heads, c.head_dim]);
            let attended = match attention {
                Attention::Prefill => cache.prefill(&q)?,
                Attention::Decode(mode) => cache.decode_with(&q, &DecodeOptions { mode, ..Default::default() })?,
            };
            add(&mut x, &layer.o.apply(&attended.o.read_blocking()?.to_f32()));

            let normed = rms_norm(&x, &layer.mlp_norm, c.rms_norm_eps);
            let mut gate = layer.gate.apply(&normed);
            silu_times(&mut gate, &layer.up.apply(&normed));
            add(&mut x, &layer.down.apply(&gate));
        }
        Ok(x)
    }

    fn embed(&self, ids: &[u32]) -> Result<Vec<f32>> {
        let width = self.config.hidden_size;
        let mut x = Vec::with_capacity(ids.len() * width);
        for &id in ids {
            let at = id as usize;
            if at >= self.config.vocab_size {
                return fail(format!("token id {id} is outside the vocabulary of {}", self.config.vocab_size));
            }
            x.extend_from_slice(&self.embedding[at * width..(at + 1) * width]);
        }
        Ok(x)
    }

    /// Bits by which each row of the residual stream `x` mispredicts its target: −log₂ of the target's probability.
    pub fn surprise(&self, x: &[f32], targets: &[u32]) -> Result<Vec<f64>> {
        let c = &self.config;
        let normed = rms_norm(x, &self.norm, c.rms_norm_eps);
        let head = if self.head.is_empty() { &self.embedding } else { &self.head };
        let logits = times_transposed(&normed, head, c.hidden_size, c.vocab_size);
        let bits = |(row, &target): (&[f32], &u32)| {
            let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let total: f64 = row.iter().map(|l| f64::from(l - max).exp()).sum();
            let Some(logit) = row.get(target as usize) else {
                return fail(format!("token id {target} is outside the vocabulary of {}", c.vocab_size));
            };
            Ok((total.ln() - f64::from(logit - max)) / std::f64::consts::LN_2)
        };
        logits.chunks(c.vocab_size).zip(targets).map(bits).collect()
    }
}

fn add(to: &mut [f32], x: &[f32]) {
    to.iter_mut().zip(x).for_each(|(t, x)| *t += x);
}

/// Turns each pair of channels (i, i + half) by position·frequency, in place; x `[tokens, heads, head_dim]`.
fn rotate(x: &mut [f32], start: usize, heads: usize, frequencies: &[f32]) {
    let half = frequencies.len();
    x.par_chunks_mut(heads * 2 * half).enumerate().for_each(|(t, token)| {
        let turn = |f: &f32| {
            let (sin, cos) = ((start + t) as f64 * f64::from(*f)).sin_cos();
            (sin as f32, cos as f32)
        };
        let turns: Vec<(f32, f32)> = frequencies.iter().map(turn).collect();
        for head in token.chunks_mut(2 * half) {
            let (low, high) = head.split_at_mut(half);
            for ((a, b), (sin, cos)) in low.iter_mut().zip(high).zip(&turns) {
                (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
            }
        }
    });
}
