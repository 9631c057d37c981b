//! Linear layers and norms on the CPU.

use gemm::{Parallelism, gemm};
use rayon::prelude::*;

use crate::Result;
use crate::weights::Weights;

/// y = x·Wᵀ + b.
pub struct Linear {
    /// `[outputs, inputs]`.
    weight: Vec<f32>,
    /// `[outputs]`, or empty.
    bias: Vec<f32>,
    inputs: usize,
    outputs: usize,
}

impl Linear {
    /// Takes `{name}.weight` and, where it has one, `{name}.bias`.
    pub fn take(weights: &mut Weights<'_>, name: &str, outputs: usize, inputs: usize, bias: bool) -> Result<Self> {
        let weight = weights.take(&format!("{name}.weight"), &[outputs, inputs])?;
        let bias = match bias {
            true => weights.take(&format!("{name}.bias"), &[outputs])?,
            false => Vec::new(),
        };
        Ok(Self { weight, bias, inputs, outputs })
    }

    /// Number of weights.
    pub fn parameters(&self) -> usize {
        self.weight.len() + self.bias.len()
    }

    /// x `[rows, inputs]` to `[rows, outputs]`.
    pub fn apply(&self, x: &[f32]) -> Vec<f32> {
        let mut y = times_transposed(x, &self.weight, self.inputs, self.outputs);
        if !self.bias.is_empty() {
            for row in y.chunks_mut(self.outputs) {
                row.iter_mut().zip(&self.bias).for_each(|(y, b)| *y += b);
            }
        }
        y
    }
}

/// x·Wᵀ of x `[rows, inputs]` and W `[outputs, inputs]`.
pub fn times_transposed(x: &[f32], weight: &[f32], inputs: usize, outputs: usize) -> Vec<f32> {
    let rows = x.len() / inputs;
    assert_eq!((x.len(), weight.len()), (rows * inputs, outputs * inputs), "x or W does not fit its shape");
    let mut y = vec![0.0f32; rows * outputs];
    // SAFETY: y is rows*outputs, x rows*inputs (both row-major) and W outputs*inputs, read as its transpose: every
    // element that the strides reach lies inside its slice, and y overlaps neither input.
    unsafe {
        gemm(
            rows,
            outputs,
            inputs,
            y.as_mut_ptr(),
            1,
            outputs as isize,
            false,
            x.as_ptr(),
            1,
            inputs as isize,
            weight.as_ptr(),
            inputs as isize,
            1,
            0.0,
            1.0,
            false,
            false,
            false,
            Parallelism::Rayon(0),
        );
    }
    y
}

/// x / √(mean x² + ε) · weight, row by row.
pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32) -> Vec<f32> {
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks(weight.len()) {
        let mean = row.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>() / row.len() as f64;
        let scale = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        y.extend(row.iter().zip(weight).map(|(x, w)| x * scale * w));
    }
    y
}

/// SiLU(gate)·up, in place of `gate`.
pub fn silu_times(gate: &mut [f32], up: &[f32]) {
    gate.par_iter_mut().zip(up).for_each(|(g, u)| *g = *g / (1.0 + (-*g).exp()) * u);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_is_with_the_transpose() {
        let x = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let weight = [1.0, 0.0, -1.0, 2.0, 1.0, 0.5];
        assert_eq!(times_transposed(&x, &weight, 3, 2), [-2.0, 5.5, -2.0, 16.0]);
    }

    #[test]
    fn norm_has_unit_mean_square() {
        let y = rms_norm(&[3.0, -4.0], &[1.0, 1.0], 1e-12);
        assert!((y[0] * y[0] + y[1] * y[1] - 2.0).abs() < 1e-6);
    }
}
