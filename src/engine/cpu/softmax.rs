//! Softmax over terms that come block by block, with what was summed before rescaled to the largest logit so far.

use crate::engine::cpu::simd::Lanes;

/// Softmax over the keys seen so far, for `heads` query heads: largest logit, sum of exponentials relative to it, and
/// the weighted sum of values.
#[derive(Clone, Debug)]
pub(crate) struct Partial {
    pub max: Vec<f32>,
    pub sum: Vec<f32>,
    /// `[head][dv]`.
    pub o: Vec<f32>,
}

impl Partial {
    pub fn empty(heads: usize, dv: usize) -> Self {
        Self { max: vec![f32::NEG_INFINITY; heads], sum: vec![0.0; heads], o: vec![0.0; heads * dv] }
    }

    /// Adds the keys of `other`, which are none of ours.
    pub fn merge(&mut self, other: &Self) {
        let dv = self.o.len() / self.max.len().max(1);
        for h in 0..self.max.len() {
            if other.max[h] == f32::NEG_INFINITY && other.sum[h] == 0.0 {
                continue;
            }
            let max = self.max[h].max(other.max[h]);
            let (ours, theirs) = ((self.max[h] - max).exp(), (other.max[h] - max).exp());
            self.max[h] = max;
            self.sum[h] = ours * self.sum[h] + theirs * other.sum[h];
            for (o, x) in self.o[h * dv..][..dv].iter_mut().zip(&other.o[h * dv..]) {
                *o = ours * *o + theirs * x;
            }
        }
    }

    /// Writes o (`value_dim` of each row) and lse; an empty set gives 0 and −∞.
    pub fn finish(&self, value_dim: usize, o: &mut [f32], lse: &mut [f32]) {
        let dv = self.o.len() / self.max.len().max(1);
        for h in 0..self.max.len() {
            let out = &mut o[h * value_dim..][..value_dim];
            if self.sum[h] == 0.0 {
                out.fill(0.0);
                lse[h] = f32::NEG_INFINITY;
            } else {
                let scale = 1.0 / self.sum[h];
                out.iter_mut().zip(&self.o[h * dv..]).for_each(|(o, x)| *o = x * scale);
                lse[h] = self.max[h] + self.sum[h].ln();
            }
        }
    }
}

/// Turns raw logits into weights relative to the new maximum; returns the factor for what was summed before.
/// Logits of −∞ are masked keys.
#[inline(always)]
pub(crate) fn soften<S: Lanes>(simd: S, logits: &mut [f32], scale: f32, max: &mut f32, sum: &mut f32) -> f32 {
    let (logits, _) = S::as_mut_simd_f32s(logits);
    let factor = simd.splat_f32s(scale);
    let masked = simd.splat_f32s(f32::NEG_INFINITY);
    let mut best = masked;
    for x in logits.iter_mut() {
        // A masked key stays masked whatever the sign of the scale.
        let seen = simd.greater_than_f32s(*x, masked);
        let scaled = simd.transmute_u32s_f32s(simd.mul_f32s(*x, factor));
        *x = simd.transmute_f32s_u32s(simd.select_u32s(seen, scaled, simd.transmute_u32s_f32s(masked)));
        best = simd.max_f32s(best, *x);
    }
    let new = max.max(simd.reduce_max_f32s(best));
    if new == f32::NEG_INFINITY {
        logits.fill(simd.splat_f32s(0.0));
        return 1.0;
    }
    let shrink = if *max == new { 1.0 } else { (*max - new).exp() };
    let reference = simd.splat_f32s(new);
    let mut total = simd.splat_f32s(0.0);
    for x in logits.iter_mut() {
        *x = simd.exp(simd.sub_f32s(*x, reference));
        total = simd.add_f32s(total, *x);
    }
    *sum = *sum * shrink + simd.reduce_sum_f32s(total);
    *max = new;
    shrink
}

#[inline(always)]
pub(crate) fn rescale<S: Lanes>(simd: S, o: &mut [f32], factor: f32) {
    if factor != 1.0 {
        let factor = simd.splat_f32s(factor);
        for o in S::as_mut_simd_f32s(o).0 {
            *o = simd.mul_f32s(*o, factor);
        }
    }
}
