//! The table scorer: all four scorings are sums over tables of products (or sums) of look-ups, and an epilogue.

// Loops by index over arrays of constant length unroll into registers; iterators keep state in memory.
#![allow(clippy::needless_range_loop)]

use crate::engine::cpu::simd::{Kernel, Lanes, ROW, prefetch_far};
use crate::lsh::BitLayout;

/// How many keys ahead the bits are asked for: hardware does not follow one stream per word.
const AHEAD: usize = 128;

/// Scores the keys of one page and kv head for all query heads of the group: gain·Σ·scale + shift·scale + bias.
pub(crate) struct Score<'a> {
    pub layout: BitLayout,
    /// Digits of a code combine by product rather than sum.
    pub multiplies: bool,
    /// `[word][page token]`.
    pub bits: &'a [u32],
    /// Page tokens: the distance between words.
    pub stride: usize,
    /// Keys to score, rounded up to whole vectors inside the page.
    pub keys: usize,
    pub gain: Option<&'a [f32]>,
    pub bias: Option<&'a [f32]>,
    /// `[query head][table][digit][16]`.
    pub tables: &'a [f32],
    /// Per query head, added before scaling.
    pub shifts: &'a [f32],
    pub scale: f32,
    /// `[query head][page token]`.
    pub out: &'a mut [f32],
}

impl Kernel for Score<'_> {
    type Output = ();

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        match (self.layout.digits(), self.multiplies) {
            (1, true) => self.heads::<S, 1, true>(simd),
            (2, true) => self.heads::<S, 2, true>(simd),
            (3, true) => self.heads::<S, 3, true>(simd),
            (_, true) => self.heads::<S, 4, true>(simd),
            (1, false) => self.heads::<S, 1, false>(simd),
            (2, false) => self.heads::<S, 2, false>(simd),
            (3, false) => self.heads::<S, 3, false>(simd),
            (_, false) => self.heads::<S, 4, false>(simd),
        }
    }
}

impl Score<'_> {
    /// As many query heads at once as share a read of the bits without spilling.
    #[inline(always)]
    fn heads<S: Lanes, const DIGITS: usize, const PRODUCT: bool>(mut self, simd: S) {
        let heads = self.shifts.len();
        let mut head = 0;
        while head < heads {
            head += match heads - head {
                4.. => self.scan::<S, DIGITS, PRODUCT, 4>(simd, head),
                2.. => self.scan::<S, DIGITS, PRODUCT, 2>(simd, head),
                _ => self.scan::<S, DIGITS, PRODUCT, 1>(simd, head),
            };
        }
    }

    #[inline(always)]
    fn scan<S: Lanes, const DIGITS: usize, const PRODUCT: bool, const H: usize>(
        &mut self,
        simd: S,
        head: usize,
    ) -> usize {
        let lanes = S::F32_LANES;
        let layout = self.layout;
        let per_head = layout.tables * DIGITS;
        assert!(self.tables.len() >= (head + H) * per_head * BitLayout::DIGIT);
        let first_table = self.tables[head * per_head * BitLayout::DIGIT..].as_ptr().cast::<[f32; BitLayout::DIGIT]>();
        let end = self.keys.next_multiple_of(2 * ROW).min(self.stride);
        assert!(end.is_multiple_of(2 * lanes) && self.bits.len().is_multiple_of(self.stride));
        if head == 0 {
            for key in (0..AHEAD.min(end)).step_by(ROW) {
                self.bits.chunks_exact(self.stride).for_each(|word| prefetch_far(word, key));
            }
        }
        let zero = simd.splat_f32s(0.0);
        for key in (0..end).step_by(2 * lanes) {
            let mut sums = [[zero; 2]; H];
            let mut entry = 0;
            for word in self.bits.chunks_exact(self.stride) {
                if head == 0 {
                    prefetch_far(word, key + AHEAD);
                    prefetch_far(word, key + AHEAD + lanes);
                }
                let word = [simd.load_u32(&word[key..]), simd.load_u32(&word[key + lanes..])];
                let mut shift = 0;
                for _ in 0..layout.tables_per_word() {
                    if entry == per_head {
                        break;
                    }
                    let mut index = [word; DIGITS];
                    for d in 0..DIGITS {
                        for i in 0..2 {
                            index[d][i] = simd.shift_right(word[i], shift + 4 * d as u32);
                        }
                    }
                    for h in 0..H {
                        // SAFETY: entry + DIGITS ≤ per_head, a multiple of DIGITS, and the assertion above holds the
                        // tables of H heads inside the slice.
                        let table = unsafe { &*first_table.add(h * per_head + entry).cast::<[[f32; 16]; DIGITS]>() };
                        for i in 0..2 {
                            let mut found = simd.lookup(&table[0], index[0][i]);
                            if PRODUCT && DIGITS > 1 {
                                for d in 1..DIGITS - 1 {
                                    found = simd.mul_f32s(found, simd.lookup(&table[d], index[d][i]));
                                }
                                let last = simd.lookup(&table[DIGITS - 1], index[DIGITS - 1][i]);
                                sums[h][i] = simd.mul_add_e_f32s(found, last, sums[h][i]);
                            } else {
                                for d in 1..DIGITS {
                                    found = simd.add_f32s(found, simd.lookup(&table[d], index[d][i]));
                                }
                                sums[h][i] = simd.add_f32s(sums[h][i], found);
                            }
                        }
                    }
                    entry += DIGITS;
                    shift += layout.planes as u32;
                }
            }
            for i in 0..2 {
                let at = key + i * lanes;
                let gain = match self.gain {
                    Some(gain) => simd.load(&gain[at..]),
                    None => simd.splat_f32s(1.0),
                };
                let bias = match self.bias {
                    Some(bias) => simd.load(&bias[at..]),
                    None => zero,
                };
                for h in 0..H {
                    let shift = simd.splat_f32s(self.shifts[head + h]);
                    let sum = simd.mul_add_e_f32s(gain, sums[h][i], shift);
                    let score = simd.mul_add_e_f32s(sum, simd.splat_f32s(self.scale), bias);
                    simd.store(&mut self.out[(head + h) * self.stride + at..], score);
                }
            }
        }
        H
    }
}

/// Replaces the scores of a group, `[query head][stride]`, by their mean in `out`.
pub(crate) fn mean(scores: &[f32], stride: usize, keys: usize, out: &mut [f32]) {
    let heads = scores.len() / stride;
    out[..keys].fill(0.0);
    for head in scores.chunks_exact(stride) {
        out[..keys].iter_mut().zip(head).for_each(|(o, s)| *o += s);
    }
    out[..keys].iter_mut().for_each(|o| *o /= heads as f32);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::simd::Level;

    /// The formula over codes, table by table.
    fn naive(score: &Score<'_>, head: usize, key: usize) -> f64 {
        let layout = score.layout;
        let table = &score.tables[head * layout.entries()..];
        let mut sum = 0.0;
        for l in 0..layout.tables {
            let code = layout.code(score.bits[l / layout.tables_per_word() * score.stride + key], l);
            let digit = |d: usize| f64::from(table[(l * layout.digits() + d) * 16 + (code >> (4 * d) & 15) as usize]);
            sum += match score.multiplies {
                true => (0..layout.digits()).map(digit).product::<f64>(),
                false => (0..layout.digits()).map(digit).sum::<f64>(),
            };
        }
        let gain = score.gain.map_or(1.0, |g| f64::from(g[key]));
        let bias = score.bias.map_or(0.0, |b| f64::from(b[key]));
        (gain * sum + f64::from(score.shifts[head])) * f64::from(score.scale) + bias
    }

    /// Every instruction set here, every width of a code, group sizes with remainders, odd key counts. Tables of whole
    /// codes repeat in their top digit, as the query's tables do.
    #[test]
    fn every_level_equals_the_formula() {
        let stride = 128;
        let mut state = 7u32;
        let mut random = move || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state >> 1 ^ state << 17
        };
        for level in Level::available() {
            for planes in 1..=16 {
                for (tables, heads, keys) in [(1, 1, 1), (7, 3, 37), (13, 7, 127), (5, 8, 128)] {
                    let layout = BitLayout { tables, planes };
                    let bits: Vec<u32> = (0..layout.words() * stride).map(|_| random()).collect();
                    let mut float =
                        |n: usize| -> Vec<f32> { (0..n).map(|_| (random() >> 16) as f32 / 65536.0).collect() };
                    let mut entries = float(heads * layout.entries());
                    let top = planes - 4 * (layout.digits() - 1);
                    for table in entries.chunks_mut(16 * layout.digits()) {
                        let last = &mut table[16 * (layout.digits() - 1)..];
                        (0..16).for_each(|i| last[i] = last[i % (1 << top)]);
                    }
                    let (gain, bias, shifts) = (float(stride), float(stride), float(heads));
                    for multiplies in [false, true] {
                        let mut out = vec![0.0; heads * stride];
                        let formula = Score {
                            layout,
                            multiplies,
                            bits: &bits,
                            stride,
                            keys,
                            gain: multiplies.then_some(&gain),
                            bias: (!multiplies).then_some(&bias),
                            tables: &entries,
                            shifts: &shifts,
                            scale: 0.25,
                            out: &mut [],
                        };
                        level.run(Score { out: &mut out, ..formula });
                        for (head, out) in out.chunks(stride).enumerate() {
                            for (key, got) in out.iter().enumerate().take(keys) {
                                let expected = naive(&formula, head, key);
                                let error = (f64::from(*got) - expected).abs();
                                assert!(
                                    error <= 1e-5 * expected.abs().max(1.0),
                                    "{level:?} P{planes} {got} {expected}"
                                );
                            }
                        }
                    }
                }
            }
        }
    }

    #[test]
    fn mean_of_a_group() {
        let scores = [1.0, 2.0, 9.0, 3.0, 6.0, 9.0];
        let mut out = [0.0; 3];
        mean(&scores, 3, 2, &mut out);
        assert_eq!(out, [2.0, 4.0, 0.0]);
    }
}
