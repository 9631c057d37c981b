//! The model, its loss, and Adam.

use crate::Result;
use crate::attention::{Attention, Block, Sizes};
use crate::layers::{Layer, Linear, Parameter, Residual, RmsNorm, Silu};
use crate::task::Batch;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::SeedableRng;

/// Standard deviation of the weights of a layer with `inputs` inputs, at first: small enough that no softmax and no
/// tanh begins saturated.
pub fn spread(inputs: usize) -> f32 {
    0.5 / (inputs as f32).sqrt()
}

/// Embedding, two layers of attention and MLP, norm, and a projection to the vocabulary where an answer is asked for.
pub struct Model {
    width: usize,
    vocabulary: usize,
    embedding: Parameter,
    blocks: Vec<Residual>,
    norm: RmsNorm,
    output: Linear,
}

const LAYERS: usize = 2;
const MLP_FACTOR: usize = 2;

/// Of the answers of a batch.
#[derive(Clone, Copy, Debug, Default)]
pub struct Score {
    /// Mean cross entropy, nats.
    pub loss: f64,
    /// Share whose most likely token is right.
    pub accuracy: f64,
}

impl Model {
    pub fn new(
        sizes: Sizes,
        vocabulary: usize,
        conv: usize,
        seed: u64,
        mut attention: impl FnMut(u64) -> Result<Box<dyn Attention + Send>>,
    ) -> Result<Self> {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let width = sizes.heads * sizes.head_dim;
        let embedding = Parameter::normal(&mut rng, vocabulary * width, 1.0);
        let mut blocks = Vec::new();
        for layer in 0..LAYERS {
            let attention = attention(seed * LAYERS as u64 + layer as u64)?;
            blocks.push(Residual(vec![Box::new(Block::new(&mut rng, sizes, conv, attention))]));
            let hidden = MLP_FACTOR * width;
            blocks.push(Residual(vec![
                Box::new(RmsNorm::new(width)),
                Box::new(Linear::new(&mut rng, width, hidden, spread(width))),
                Box::new(Silu::default()),
                Box::new(Linear::new(&mut rng, hidden, width, spread(hidden))),
            ]));
        }
        let output = Linear::new(&mut rng, width, vocabulary, spread(width));
        Ok(Self { width, vocabulary, embedding, blocks, norm: RmsNorm::new(width), output })
    }

    /// Every trained number.
    pub fn parameters(&mut self) -> Vec<&mut Parameter> {
        let mut all = vec![&mut self.embedding];
        all.extend(self.blocks.iter_mut().flat_map(Layer::parameters));
        all.extend(self.norm.parameters());
        all.extend(self.output.parameters());
        all
    }

    /// Logits of the answers, `[answers, vocabulary]`.
    fn logits(&mut self, batch: &Batch) -> Result<Vec<f32>> {
        let w = self.width;
        let x: Vec<f32> =
            batch.inputs.iter().flat_map(|&t| &self.embedding.value[t * w..(t + 1) * w]).copied().collect();
        let x = self.blocks.iter_mut().try_fold(x, |x, block| block.forward(&x))?;
        let asked: Vec<f32> = batch.answers.iter().flat_map(|&(row, _)| &x[row * w..(row + 1) * w]).copied().collect();
        self.output.forward(&self.norm.forward(&asked)?)
    }

    pub fn score(&mut self, batch: &Batch) -> Result<Score> {
        let logits = self.logits(batch)?;
        Ok(judge(&logits, batch, self.vocabulary).0)
    }

    /// Gradients of the mean loss, in place of what the parameters held; the score before any step.
    pub fn gradients(&mut self, batch: &Batch) -> Result<Score> {
        self.parameters().iter_mut().for_each(|p| p.gradient.fill(0.0));
        let logits = self.logits(batch)?;
        let (score, dlogits) = judge(&logits, batch, self.vocabulary);
        let dasked = self.norm.backward(&self.output.backward(&dlogits)?)?;
        let w = self.width;
        let mut dx = vec![0.0; batch.inputs.len() * w];
        for (&(row, _), d) in batch.answers.iter().zip(dasked.chunks(w)) {
            dx[row * w..(row + 1) * w].copy_from_slice(d);
        }
        let dx = self.blocks.iter_mut().rev().try_fold(dx, |dx, block| block.backward(&dx))?;
        for (&token, d) in batch.inputs.iter().zip(dx.chunks(w)) {
            let to = &mut self.embedding.gradient[token * w..(token + 1) * w];
            to.iter_mut().zip(d).for_each(|(t, d)| *t += d);
        }
        Ok(score)
    }
}

/// Score and the gradient of the mean cross entropy with respect to the logits.
fn judge(logits: &[f32], batch: &Batch, vocabulary: usize) -> (Score, Vec<f32>) {
    let count = batch.answers.len() as f64;
    let (mut score, mut gradient) = (Score::default(), Vec::with_capacity(logits.len()));
    for (row, &(_, answer)) in logits.chunks(vocabulary).zip(&batch.answers) {
        let peak = row.iter().fold(f32::NEG_INFINITY, |a, b| a.max(*b));
        let sum: f32 = row.iter().map(|x| (x - peak).exp()).sum();
        score.loss += f64::from(sum.ln() + peak - row[answer]) / count;
        score.accuracy += f64::from(u8::from(row[answer] >= peak)) / count;
        let one = |i| if i == answer { 1.0 } else { 0.0 };
        gradient.extend(row.iter().enumerate().map(|(i, x)| ((x - peak).exp() / sum - one(i)) / count as f32));
    }
    (score, gradient)
}

/// Adam with a warm-up and a cosine decay, and gradients cut to norm 1.
pub struct Adam {
    rate: f32,
    steps: usize,
    done: usize,
    /// First and second moment of every parameter.
    moments: Vec<[Vec<f32>; 2]>,
}

impl Adam {
    pub fn new(rate: f32, steps: usize) -> Self {
        Self { rate, steps, done: 0, moments: Vec::new() }
    }

    fn rate(&self) -> f32 {
        let warm_up = (self.steps / 20).max(1);
        let part = self.done as f32 / self.steps as f32;
        let rise = (self.done + 1) as f32 / warm_up as f32;
        self.rate * rise.min(1.0) * (0.55 + 0.45 * (part * std::f32::consts::PI).cos())
    }

    pub fn step(&mut self, parameters: Vec<&mut Parameter>) {
        const BETA: [f32; 2] = [0.9, 0.98];
        let norm = parameters.iter().flat_map(|p| &p.gradient).map(|g| g * g).sum::<f32>().sqrt();
        let cut = 1.0 / norm.max(1.0);
        let rate = self.rate();
        self.done += 1;
        let unbias = BETA.map(|beta| 1.0 / (1.0 - beta.powi(self.done as i32)));
        if self.moments.is_empty() {
            self.moments = parameters.iter().map(|p| [vec![0.0; p.value.len()], vec![0.0; p.value.len()]]).collect();
        }
        for (parameter, [first, second]) in parameters.into_iter().zip(&mut self.moments) {
            let gradients = parameter.gradient.iter().zip(first).zip(second);
            for (value, ((gradient, first), second)) in parameter.value.iter_mut().zip(gradients) {
                let gradient = gradient * cut;
                *first = BETA[0] * *first + (1.0 - BETA[0]) * gradient;
                *second = BETA[1] * *second + (1.0 - BETA[1]) * gradient * gradient;
                *value -= rate * *first * unbias[0] / ((*second * unbias[1]).sqrt() + 1e-8);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::attention::Softmax;
    use crate::task::{Source, Task};

    fn model() -> (Model, Batch) {
        let sizes = Sizes { tokens: 16, heads: 2, head_dim: 4 };
        let model = Model::new(sizes, 12, 2, 1, |_| Ok(Box::new(Softmax::new(sizes)))).unwrap();
        (model, Source::new(Task { vocabulary: 12, tokens: 16, pairs: 3 }, 1).batch(4))
    }

    #[test]
    fn gradients_of_the_whole_model() {
        let (mut model, batch) = model();
        model.gradients(&batch).unwrap();
        let gradients: Vec<Vec<f32>> = model.parameters().iter().map(|p| p.gradient.clone()).collect();
        for (i, gradient) in gradients.iter().enumerate() {
            // Along the gradient itself: the steepest way up, where a difference is clearest.
            let norm = gradient.iter().map(|g| g * g).sum::<f32>().sqrt();
            let mut side = |sign: f32| {
                let mut parameters = model.parameters();
                let before = parameters[i].value.clone();
                parameters[i].value.iter_mut().zip(gradient).for_each(|(v, g)| *v += sign * 1e-2 * g / norm);
                let loss = model.score(&batch).unwrap().loss;
                model.parameters()[i].value = before;
                loss
            };
            let numeric = ((side(1.0) - side(-1.0)) / 2e-2) as f32;
            assert!((numeric - norm).abs() < 0.02 * norm + 2e-5, "parameter {i}: {numeric} by difference, not {norm}");
        }
    }

    #[test]
    fn steps_lower_the_loss() {
        let (mut model, batch) = model();
        let mut adam = Adam::new(1e-2, 40);
        let first = model.gradients(&batch).unwrap().loss;
        for _ in 0..40 {
            model.gradients(&batch).unwrap();
            adam.step(model.parameters());
        }
        assert!(model.score(&batch).unwrap().loss < 0.5 * first);
    }
}
