//! The table scorer: all four scorings are sums over tables of products (or sums) of look-ups, and an epilogue.

use crate::engine::cpu::simd::{Kernel, Lanes, ROW};
use crate::lsh::BitLayout;

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
        let (tables, _) = self.tables.as_chunks::<{ BitLayout::DIGIT }>();
        let per_head = layout.tables * DIGITS;
        let mut of_head: [&[[f32; 16]]; H] = [&[]; H];
        for (h, of_head) in of_head.iter_mut().enumerate() {
            *of_head = &tables[(head + h) * per_head..][..per_head];
        }
        let zero = simd.splat_f32s(0.0);
        let scale = simd.splat_f32s(self.scale);
        let end = self.keys.next_multiple_of(2 * ROW).min(self.stride);
        for key in (0..end).step_by(2 * lanes) {
            let mut sums = [[zero; 2]; H];
            let mut entry = 0;
            for word in self.bits.chunks_exact(self.stride) {
                let word = [simd.load_u32(&word[key..]), simd.load_u32(&word[key + lanes..])];
                let mut shift = 0;
                for _ in 0..layout.tables_per_word() {
                    if entry == per_head {
                        break;
                    }
                    let mut index = [word; DIGITS];
                    for (d, index) in index.iter_mut().enumerate() {
                        for index in index {
                            *index = simd.shift_right(*index, shift + 4 * d as u32);
                        }
                    }
                    for (sums, tables) in sums.iter_mut().zip(of_head) {
                        let table: &[[f32; 16]; DIGITS] = match tables[entry..entry + DIGITS].try_into() {
                            Ok(table) => table,
                            Err(_) => return H,
                        };
                        for (i, sum) in sums.iter_mut().enumerate() {
                            let mut first = simd.lookup(&table[0], index[0][i]);
                            if PRODUCT {
                                for d in 1..DIGITS - 1 {
                                    first = simd.mul_f32s(first, simd.lookup(&table[d], index[d][i]));
                                }
                                *sum = if DIGITS == 1 {
                                    simd.add_f32s(*sum, first)
                                } else {
                                    let last = simd.lookup(&table[DIGITS - 1], index[DIGITS - 1][i]);
                                    simd.mul_add_e_f32s(first, last, *sum)
                                };
                            } else {
                                for d in 1..DIGITS {
                                    first = simd.add_f32s(first, simd.lookup(&table[d], index[d][i]));
                                }
                                *sum = simd.add_f32s(*sum, first);
                            }
                        }
                    }
                    entry += DIGITS;
                    shift += layout.planes as u32;
                }
            }
            for (h, sums) in sums.iter().enumerate() {
                let shift = simd.splat_f32s(self.shifts[head + h]);
                let out = &mut self.out[(head + h) * self.stride..][..self.stride];
                for (i, sum) in sums.iter().enumerate() {
                    let at = key + i * lanes;
                    let gain = match self.gain {
                        Some(gain) => simd.load(&gain[at..]),
                        None => simd.splat_f32s(1.0),
                    };
                    let logit = simd.mul_f32s(simd.mul_add_e_f32s(gain, *sum, shift), scale);
                    let bias = match self.bias {
                        Some(bias) => simd.load(&bias[at..]),
                        None => zero,
                    };
                    simd.store(&mut out[at..], simd.add_f32s(logit, bias));
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
