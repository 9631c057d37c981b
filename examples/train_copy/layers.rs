//! What a small model is made of: each layer keeps what its own backward needs.

use crate::Result;
use crate::matrix::{View, multiply};
use rand_chacha::ChaCha8Rng;
use rand_distr::{Distribution, StandardNormal};

/// Trained numbers and their gradient.
#[derive(Clone, Debug, Default)]
pub struct Parameter {
    pub value: Vec<f32>,
    pub gradient: Vec<f32>,
}

impl Parameter {
    pub fn new(value: Vec<f32>) -> Self {
        let gradient = vec![0.0; value.len()];
        Self { value, gradient }
    }

    /// Normal numbers of standard deviation `spread`.
    pub fn normal(rng: &mut ChaCha8Rng, len: usize, spread: f32) -> Self {
        Self::new(
            (0..len)
                .map(|_| {
                    let x: f32 = StandardNormal.sample(rng);
                    x * spread
                })
                .collect(),
        )
    }
}

/// Rows in, rows out. `backward` belongs to the last `forward` and adds to the parameters' gradients.
pub trait Layer {
    fn forward(&mut self, x: &[f32]) -> Result<Vec<f32>>;
    fn backward(&mut self, dy: &[f32]) -> Result<Vec<f32>>;
    fn parameters(&mut self) -> Vec<&mut Parameter>;
}

/// y = x·W.
pub struct Linear {
    /// `[inputs, outputs]`.
    weight: Parameter,
    inputs: usize,
    outputs: usize,
    x: Vec<f32>,
}

impl Linear {
    pub fn new(rng: &mut ChaCha8Rng, inputs: usize, outputs: usize, spread: f32) -> Self {
        Self { weight: Parameter::normal(rng, inputs * outputs, spread), inputs, outputs, x: Vec::new() }
    }
}

impl Layer for Linear {
    fn forward(&mut self, x: &[f32]) -> Result<Vec<f32>> {
        self.x = x.to_vec();
        let mut y = vec![0.0; x.len() / self.inputs * self.outputs];
        multiply(View::new(x, self.inputs), View::new(&self.weight.value, self.outputs), &mut y, self.outputs, 0.0);
        Ok(y)
    }

    fn backward(&mut self, dy: &[f32]) -> Result<Vec<f32>> {
        let (x, dy) = (View::new(&self.x, self.inputs), View::new(dy, self.outputs));
        multiply(x.transposed(), dy, &mut self.weight.gradient, self.outputs, 1.0);
        let mut dx = vec![0.0; self.x.len()];
        let weight = View::new(&self.weight.value, self.outputs);
        multiply(dy, weight.transposed(), &mut dx, self.inputs, 0.0);
        Ok(dx)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        vec![&mut self.weight]
    }
}

/// y = x / √(mean x² + ε) · weight.
pub struct RmsNorm {
    weight: Parameter,
    x: Vec<f32>,
}

impl RmsNorm {
    pub fn new(width: usize) -> Self {
        Self { weight: Parameter::new(vec![1.0; width]), x: Vec::new() }
    }
}

fn inverse_rms(row: &[f32]) -> f32 {
    1.0 / (row.iter().map(|x| x * x).sum::<f32>() / row.len() as f32 + 1e-6).sqrt()
}

impl Layer for RmsNorm {
    fn forward(&mut self, x: &[f32]) -> Result<Vec<f32>> {
        self.x = x.to_vec();
        let weight = &self.weight.value;
        let rows = x.chunks(weight.len()).flat_map(|row| {
            let scale = inverse_rms(row);
            row.iter().zip(weight).map(move |(x, w)| x * scale * w)
        });
        Ok(rows.collect())
    }

    fn backward(&mut self, dy: &[f32]) -> Result<Vec<f32>> {
        let width = self.weight.value.len();
        let mut dx = Vec::with_capacity(dy.len());
        for (row, dy) in self.x.chunks(width).zip(dy.chunks(width)) {
            let scale = inverse_rms(row);
            let mut along = 0.0;
            for (i, (x, dy)) in row.iter().zip(dy).enumerate() {
                self.weight.gradient[i] += dy * x * scale;
                along += dy * self.weight.value[i] * x;
            }
            let along = along * scale * scale / width as f32;
            dx.extend(row.iter().zip(dy).zip(&self.weight.value).map(|((x, dy), w)| scale * (dy * w - x * along)));
        }
        Ok(dx)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        vec![&mut self.weight]
    }
}

/// Each channel of a token from its own last `width` values: what lets a key know its neighbour.
pub struct ShortConv {
    /// `[width, channels]`, the token's own value first.
    weight: Parameter,
    tokens: usize,
    channels: usize,
    x: Vec<f32>,
}

impl ShortConv {
    pub fn new(rng: &mut ChaCha8Rng, tokens: usize, channels: usize, width: usize) -> Self {
        let spread = (1.0 / width as f32).sqrt();
        Self { weight: Parameter::normal(rng, width * channels, spread), tokens, channels, x: Vec::new() }
    }

    /// Calls `row` for every pair of output and input row and the tap that joins them.
    fn pairs(&self, rows: usize, mut row: impl FnMut(usize, usize, usize)) {
        let width = self.weight.value.len() / self.channels;
        for out in 0..rows {
            for tap in 0..width.min(out % self.tokens + 1) {
                row(out, out - tap, tap);
            }
        }
    }
}

fn row(data: &[f32], index: usize, width: usize) -> &[f32] {
    &data[index * width..(index + 1) * width]
}

fn add_product(to: &mut [f32], index: usize, a: &[f32], b: &[f32]) {
    let to = &mut to[index * a.len()..(index + 1) * a.len()];
    to.iter_mut().zip(a).zip(b).for_each(|((to, a), b)| *to += a * b);
}

impl Layer for ShortConv {
    fn forward(&mut self, x: &[f32]) -> Result<Vec<f32>> {
        self.x = x.to_vec();
        let (c, mut y) = (self.channels, vec![0.0; x.len()]);
        self.pairs(x.len() / c, |out, from, tap| {
            add_product(&mut y, out, row(x, from, c), row(&self.weight.value, tap, c));
        });
        Ok(y)
    }

    fn backward(&mut self, dy: &[f32]) -> Result<Vec<f32>> {
        let (c, mut dx) = (self.channels, vec![0.0; dy.len()]);
        let mut gradient = std::mem::take(&mut self.weight.gradient);
        self.pairs(dy.len() / c, |out, from, tap| {
            add_product(&mut dx, from, row(dy, out, c), row(&self.weight.value, tap, c));
            add_product(&mut gradient, tap, row(dy, out, c), row(&self.x, from, c));
        });
        self.weight.gradient = gradient;
        Ok(dx)
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        vec![&mut self.weight]
    }
}

/// y = x·σ(x).
#[derive(Default)]
pub struct Silu {
    x: Vec<f32>,
}

fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + (-x).exp())
}

impl Layer for Silu {
    fn forward(&mut self, x: &[f32]) -> Result<Vec<f32>> {
        self.x = x.to_vec();
        Ok(x.iter().map(|x| x * sigmoid(*x)).collect())
    }

    fn backward(&mut self, dy: &[f32]) -> Result<Vec<f32>> {
        let slope = |x: f32| sigmoid(x) * (1.0 + x * (1.0 - sigmoid(x)));
        Ok(self.x.iter().zip(dy).map(|(x, dy)| dy * slope(*x)).collect())
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        Vec::new()
    }
}

/// Layers one after the other, added to what went in: y = x + f(x).
pub struct Residual(pub Vec<Box<dyn Layer + Send>>);

impl Layer for Residual {
    fn forward(&mut self, x: &[f32]) -> Result<Vec<f32>> {
        let y = self.0.iter_mut().try_fold(x.to_vec(), |x, layer| layer.forward(&x))?;
        Ok(x.iter().zip(y).map(|(x, y)| x + y).collect())
    }

    fn backward(&mut self, dy: &[f32]) -> Result<Vec<f32>> {
        let dx = self.0.iter_mut().rev().try_fold(dy.to_vec(), |dy, layer| layer.backward(&dy))?;
        Ok(dy.iter().zip(dx).map(|(dy, dx)| dy + dx).collect())
    }

    fn parameters(&mut self) -> Vec<&mut Parameter> {
        self.0.iter_mut().flat_map(|layer| layer.parameters()).collect()
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use rand_chacha::rand_core::SeedableRng;

    pub fn rng() -> ChaCha8Rng {
        ChaCha8Rng::seed_from_u64(3)
    }

    fn dot(a: &[f32], b: &[f32]) -> f64 {
        a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    }

    /// Central difference of r·y along `direction` of x (`at` = None) or of a parameter, against the gradient.
    fn compare(layer: &mut dyn Layer, x: &[f32], r: &[f32], at: Option<usize>, gradient: &[f32]) {
        let direction = Parameter::normal(&mut rng(), gradient.len(), 1.0).value;
        let step = 3e-3;
        let mut side = |sign: f32| {
            let mut x = x.to_vec();
            let mut parameters = layer.parameters();
            let moved = at.map_or(&mut x, |i| &mut parameters[i].value);
            let before = moved.clone();
            moved.iter_mut().zip(&direction).for_each(|(m, d)| *m += sign * step * d);
            let y = layer.forward(&x).unwrap();
            if let Some(i) = at {
                layer.parameters()[i].value = before;
            }
            dot(&y, r)
        };
        let numeric = (side(1.0) - side(-1.0)) / (2.0 * f64::from(step));
        let exact = dot(gradient, &direction);
        let size = dot(gradient, gradient).sqrt();
        assert!(size > 1e-3, "{at:?} has no gradient to check");
        assert!((numeric - exact).abs() < 0.01 * size, "{at:?}: {numeric} by difference, {exact} by gradient");
    }

    /// Compares every gradient of a layer with differences.
    pub fn check(layer: &mut dyn Layer, inputs: usize) {
        let x = Parameter::normal(&mut rng(), inputs, 1.0).value;
        let outputs = layer.forward(&x).unwrap().len();
        let mut rng = rng();
        let r = Parameter::normal(&mut rng, outputs * 2, 1.0).value.split_off(outputs);
        layer.parameters().iter_mut().for_each(|p| p.gradient.fill(0.0));
        let dx = layer.backward(&r).unwrap();
        let gradients: Vec<_> = layer.parameters().iter().map(|p| p.gradient.clone()).collect();
        compare(layer, &x, &r, None, &dx);
        for (i, gradient) in gradients.iter().enumerate() {
            compare(layer, &x, &r, Some(i), gradient);
        }
    }

    #[test]
    fn gradients_are_right() {
        let mut rng = rng();
        check(&mut Linear::new(&mut rng, 6, 5, 0.5), 6 * 7);
        check(&mut RmsNorm::new(6), 6 * 7);
        check(&mut ShortConv::new(&mut rng, 5, 6, 3), 6 * 10);
        check(&mut Silu::default(), 30);
        check(&mut Residual(vec![Box::new(Linear::new(&mut rng, 6, 6, 0.5)), Box::new(Silu::default())]), 6 * 4);
    }

    #[test]
    fn convolution_sees_no_other_sequence_and_no_future() {
        let mut conv = ShortConv::new(&mut rng(), 4, 1, 3);
        let mut x = vec![0.0; 8];
        x[3] = 1.0;
        let y = conv.forward(&x).unwrap();
        assert!(y[3] != 0.0 && y.iter().filter(|y| **y != 0.0).count() == 1);
    }
}
