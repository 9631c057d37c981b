//! Causal attention: softmax as the control, RACE through the library; and the block around either.

use crate::Result;
use crate::layers::{Layer, Linear, Parameter, RmsNorm, ShortConv};
use crate::matrix::{View, multiply};
use rand_chacha::ChaCha8Rng;
use softhash::{
    Beta, DType, Device, Gate, Hyperplanes, Normalization, Race, RaceConfig, RaceOptions, RaceShape, Tensor, TensorView,
};

/// Sizes of one attention layer.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub tokens: usize,
    pub heads: usize,
    pub head_dim: usize,
}

impl Sizes {
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }
}

/// What attends, given q, k and v as `[sequences, tokens, heads, head_dim]`.
pub trait Attention {
    fn forward(&mut self, qkv: &[Vec<f32>; 3]) -> Result<Vec<f32>>;
    /// Gradients of q, k and v of the last `forward`.
    fn backward(&mut self, qkv: &[Vec<f32>; 3], grad_o: &[f32]) -> Result<[Vec<f32>; 3]>;
    fn parameters(&mut self) -> Vec<&mut Parameter>;
}

/// The control.
pub struct Softmax {
    sizes: Sizes,
    /// `[sequences, heads, tokens, tokens]`.
    weights: Vec<f32>,
}

impl Softmax {
    pub fn new(sizes: Sizes) -> Self {
        Self { sizes, weights: Vec::new() }
    }

    /// First element of every (sequence, head) in q, k, v and o.
    fn starts(&self, elements: usize) -> impl Iterator<Item = usize> + use<> {
        let Sizes { tokens, heads, head_dim } = self.sizes;
        let sequence = tokens * heads * head_dim;
        (0..elements / sequence).flat_map(move |b| (0..heads).map(move |h| b * sequence + h * head_dim))
    }
}

impl Attention for Softmax {
    fn forward(&mut self, [q, k, v]: &[Vec<f32>; 3]) -> Result<Vec<f32>> {
        let Sizes { tokens: t, head_dim: d, .. } = self.sizes;
        let (stride, scale) = (self.sizes.width(), 1.0 / (d as f32).sqrt());
        let mut o = vec![0.0; q.len()];
        self.weights = vec![0.0; q.len() / d * t];
        let starts = self.starts(q.len());
        for (start, weights) in starts.zip(self.weights.chunks_mut(t * t)) {
            let part = |x| View::strided(x, t, d, stride);
            multiply(part(&q[start..]), part(&k[start..]).transposed(), weights, t, 0.0);
            for (i, row) in weights.chunks_mut(t).enumerate() {
                let (seen, future) = row.split_at_mut(i + 1);
                let peak = seen.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
                seen.iter_mut().for_each(|w| *w = ((*w - peak) * scale).exp());
                let sum: f32 = seen.iter().sum();
                seen.iter_mut().for_each(|w| *w /= sum);
                future.fill(0.0);
            }
            multiply(View::new(weights, t), part(&v[start..]), &mut o[start..], stride, 0.0);
        }
        Ok(o)
    }

    fn backward(&mut self, [q, k, v]: &[Vec<f32>; 3], grad_o: &[f32]) -> Result<[Vec<f32>; 3]> {
        let Sizes { tokens: t, head_dim: d, .. } = self.sizes;
        let (stride, scale) = (self.sizes.width(), 1.0 / (d as f32).sqrt());
        let [mut dq, mut dk, mut dv] = [q, k, v].map(|x| vec![0.0; x.len()]);
        let mut dw = vec![0.0; t * t];
        for (start, weights) in self.starts(q.len()).zip(self.weights.chunks(t * t)) {
            let part = |x| View::strided(x, t, d, stride);
            let grad_o = part(&grad_o[start..]);
            multiply(View::new(weights, t).transposed(), grad_o, &mut dv[start..], stride, 0.0);
            multiply(grad_o, part(&v[start..]).transposed(), &mut dw, t, 0.0);
            for (dw, w) in dw.chunks_mut(t).zip(weights.chunks(t)) {
                let mean: f32 = dw.iter().zip(w).map(|(dw, w)| dw * w).sum();
                dw.iter_mut().zip(w).for_each(|(dw, w)| *dw = w * (*dw - mean) * scale);
            }
            multiply(View::new(&dw, t), part(&k[start..]), &mut dq[start..], stride, 0.0);
            multiply(View::new(&dw, t).transposed(), part(&q[start..]), &mut dk[start..], stride, 0.0);
        }
        Ok([dq, dk, dv])
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        Vec::new()
    }
}

/// Settings of RACE.
#[derive(Clone, Copy, Debug)]
pub struct Hash {
    pub planes: usize,
    pub tables: usize,
    pub normalization: Normalization,
    /// Where β begins.
    pub beta: f32,
    pub trained: bool,
    /// Tokens of the exact window beside it; 0 for none.
    pub window: usize,
}

/// RACE attention of the library, its hyperplanes and, where asked, its β trained; the gates too, where there is a window.
pub struct RaceAttention {
    race: Race,
    sizes: Sizes,
    hyperplanes: Parameter,
    /// ln β of each head: β stays positive.
    log_beta: Parameter,
    beta_is_trained: bool,
    /// ln(g / (1 − g)) of each head's gate g.
    gate_logits: Parameter,
}

impl RaceAttention {
    pub fn new(device: &Device, sizes: Sizes, hash: Hash, seed: u64) -> Result<Self> {
        let Sizes { heads, head_dim, .. } = sizes;
        let shape =
            RaceShape { num_q_heads: heads, num_kv_heads: heads, head_dim, value_dim: head_dim, dtype: DType::F32 };
        let config = RaceConfig {
            tables: hash.tables,
            planes: hash.planes,
            normalization: hash.normalization,
            beta: Beta::PerHead(vec![hash.beta; heads]),
            hyperplanes: Hyperplanes::Gaussian { seed },
            window: hash.window,
            ..RaceConfig::default()
        };
        let race = Race::new(device, config, shape)?;
        let hyperplanes = Parameter::new(race.hyperplanes()?);
        let log_beta = Parameter::new(vec![hash.beta.ln(); heads]);
        let gate_logits = Parameter::new(vec![0.0; heads]);
        Ok(Self { race, sizes, hyperplanes, log_beta, beta_is_trained: hash.trained, gate_logits })
    }

    fn view<'a>(&self, data: &'a [f32]) -> TensorView<'a> {
        let Sizes { tokens, heads, head_dim } = self.sizes;
        TensorView::f32(data, [data.len() / (tokens * heads * head_dim), tokens, heads, head_dim])
    }

    fn beta(&self) -> Vec<f32> {
        self.log_beta.value.iter().map(|log| log.exp()).collect()
    }

    fn gates(&self) -> Vec<f32> {
        self.gate_logits.value.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect()
    }
}

fn read(tensor: &Tensor) -> Result<Vec<f32>> {
    Ok(tensor.read_blocking()?.to_f32())
}

impl Attention for RaceAttention {
    fn forward(&mut self, qkv: &[Vec<f32>; 3]) -> Result<Vec<f32>> {
        self.race.set_parameters(&self.hyperplanes.value, Beta::PerHead(self.beta()))?;
        self.race.set_gate(Gate::PerHead(self.gates()))?;
        let [q, k, v] = qkv.each_ref().map(|x| self.view(x));
        read(&self.race.forward(&q, &k, &v, None)?.o)
    }

    fn backward(&mut self, qkv: &[Vec<f32>; 3], grad_o: &[f32]) -> Result<[Vec<f32>; 3]> {
        let [q, k, v] = qkv.each_ref().map(|x| self.view(x));
        let grad_o = self.view(grad_o);
        let got = self.race.backward(&q, &k, &v, &grad_o, None, None, &RaceOptions::default())?;
        let add = |to: &mut Parameter, from: &[f32]| to.gradient.iter_mut().zip(from).for_each(|(t, f)| *t += f);
        add(&mut self.hyperplanes, &read(&got.d_planes)?);
        let of_log: Vec<f32> = read(&got.d_beta)?.iter().zip(self.beta()).map(|(d, beta)| d * beta).collect();
        add(&mut self.log_beta, &of_log);
        if let Some(d_gate) = &got.d_gate {
            let gates = self.gates();
            let of_logits: Vec<f32> = read(d_gate)?.iter().zip(gates).map(|(d, g)| d * g * (1.0 - g)).collect();
            add(&mut self.gate_logits, &of_logits);
        }
        Ok([read(&got.dq)?, read(&got.dk)?, read(&got.dv)?])
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        let mut all = vec![&mut self.hyperplanes];
        if self.beta_is_trained {
            all.push(&mut self.log_beta);
        }
        if self.race.config().window > 0 {
            all.push(&mut self.gate_logits);
        }
        all
    }
}

/// Norm, q, k and v with a short convolution each, attention, output projection.
pub struct Block {
    norm: RmsNorm,
    paths: [(Linear, ShortConv); 3],
    attention: Box<dyn Attention + Send>,
    output: Linear,
    qkv: [Vec<f32>; 3],
}

impl Block {
    pub fn new(rng: &mut ChaCha8Rng, sizes: Sizes, conv: usize, attention: Box<dyn Attention + Send>) -> Self {
        let width = sizes.width();
        let spread = crate::model::spread(width);
        let mut path = || (Linear::new(rng, width, width, spread), ShortConv::new(rng, sizes.tokens, width, conv));
        let paths = [path(), path(), path()];
        let output = Linear::new(rng, width, width, spread);
        Self { norm: RmsNorm::new(width), paths, attention, output, qkv: Default::default() }
    }
}

impl Layer for Block {
    fn forward(&mut self, x: &[f32]) -> Result<Vec<f32>> {
        let x = self.norm.forward(x)?;
        for ((linear, conv), out) in self.paths.iter_mut().zip(&mut self.qkv) {
            *out = conv.forward(&linear.forward(&x)?)?;
        }
        let o = self.attention.forward(&self.qkv)?;
        self.output.forward(&o)
    }

    fn backward(&mut self, dy: &[f32]) -> Result<Vec<f32>> {
        let grad_o = self.output.backward(dy)?;
        let gradients = self.attention.backward(&self.qkv, &grad_o)?;
        let mut sum = vec![0.0; dy.len()];
        for ((linear, conv), gradient) in self.paths.iter_mut().zip(&gradients) {
            let dx = linear.backward(&conv.backward(gradient)?)?;
            sum.iter_mut().zip(dx).for_each(|(s, d)| *s += d);
        }
        self.norm.backward(&sum)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        let mut all = self.norm.parameters();
        for (linear, conv) in &mut self.paths {
            all.extend(linear.parameters());
            all.extend(conv.parameters());
        }
        all.extend(self.attention.parameters());
        all.extend(self.output.parameters());
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::tests::{check, rng};

    const SIZES: Sizes = Sizes { tokens: 5, heads: 2, head_dim: 4 };

    #[test]
    fn softmax_block() {
        check(&mut Block::new(&mut rng(), SIZES, 2, Box::new(Softmax::new(SIZES))), 2 * 5 * 8);
    }

    #[test]
    fn race_block() {
        for normalization in [Normalization::Ratio, Normalization::BucketMean] {
            for window in [0, 3] {
                let hash = Hash { planes: 2, tables: 3, normalization, beta: 1.0, trained: true, window };
                let race = RaceAttention::new(&Device::cpu(), SIZES, hash, 0).unwrap();
                check(&mut Block::new(&mut rng(), SIZES, 2, Box::new(race)), 2 * 5 * 8);
            }
        }
    }
}
