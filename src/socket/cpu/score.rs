//! The table scorer: all four scorings are sums over tables of products (or sums) of look-ups, and an epilogue.

// Loops by index over arrays of constant length unroll into registers; iterators keep state in memory.
#![allow(clippy::needless_range_loop)]

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
        let per_head = layout.tables * DIGITS;
        assert!(self.tables.len() >= (head + H) * per_head * BitLayout::DIGIT);
        let first_table = self.tables[head * per_head * BitLayout::DIGIT..].as_ptr().cast::<[f32; BitLayout::DIGIT]>();
        let end = self.keys.next_multiple_of(2 * ROW).min(self.stride);
        assert!(end.is_multiple_of(2 * lanes) && self.bits.len().is_multiple_of(self.stride));
        let zero = simd.splat_f32s(0.0);
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
