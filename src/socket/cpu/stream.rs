//! Attention of a few query heads over keys read row by row: bound by memory, so every row is read once for all of
//! the heads and widened in registers.

// Loops by index over arrays of constant length unroll into registers; iterators keep state in memory.
#![allow(clippy::needless_range_loop)]

use crate::engine::cpu::simd::{Element, Kernel, Lanes, prefetch};
use crate::engine::cpu::softmax::{Partial, rescale, soften};

/// Keys taken together: their logits are known before their values are weighed.
pub(crate) const BLOCK: usize = 64;

/// Rows of K and V of one block of keys.
pub(crate) struct Rows<'a, E> {
    pub k: [&'a [E]; BLOCK],
    pub v: [&'a [E]; BLOCK],
}

/// Attends `count` keys; `rows` fills in the rows of keys `first..first + n`, n ≤ [`BLOCK`].
pub(crate) struct Stream<'a, E> {
    /// `[head][dk]`.
    pub q: &'a [f32],
    pub heads: usize,
    pub dk: usize,
    pub dv: usize,
    pub scale: f32,
    pub count: usize,
    pub rows: &'a (dyn Fn(usize, usize, &mut Rows<'a, E>) + 'a),
}

impl<E: Element> Kernel for Stream<'_, E> {
    type Output = Partial;

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> Partial {
        let mut state = Partial::empty(self.heads, self.dv);
        let mut logits = vec![0.0f32; self.heads * BLOCK];
        let empty: &[E] = &[];
        let mut rows = Rows { k: [empty; BLOCK], v: [empty; BLOCK] };
        let mut ahead = Rows { k: [empty; BLOCK], v: [empty; BLOCK] };
        (self.rows)(0, BLOCK.min(self.count), &mut ahead);
        for first in (0..self.count).step_by(BLOCK) {
            let n = BLOCK.min(self.count - first);
            std::mem::swap(&mut rows, &mut ahead);
            let next = BLOCK.min(self.count - first - n);
            if next > 0 {
                (self.rows)(first + n, next, &mut ahead);
            }
            self.dots(simd, &rows.k[..n], &rows.v[..n], &ahead.k[..next], &mut logits);
            for h in 0..self.heads {
                let logits = &mut logits[h * BLOCK..][..BLOCK];
                logits[n..].fill(f32::NEG_INFINITY);
                let (max, sum) = (&mut state.max[h], &mut state.sum[h]);
                let shrink = soften(simd, logits, self.scale, max, sum);
                rescale(simd, &mut state.o[h * self.dv..][..self.dv], shrink);
            }
            self.weigh(simd, &rows.v[..n], &logits, &mut state.o);
        }
        state
    }
}

impl<E: Element> Stream<'_, E> {
    /// Raw logits `[head][BLOCK]` of the keys. Meanwhile asks for what comes next, the values of these keys and the
    /// next keys: hardware follows neither scattered rows nor rows across pages.
    #[inline(always)]
    fn dots<S: Lanes>(&self, simd: S, keys: &[&[E]], values: &[&[E]], ahead: &[&[E]], logits: &mut [f32]) {
        let mut head = 0;
        while head < self.heads {
            let soon: [&[&[E]]; 2] = if head == 0 { [values, ahead] } else { [&[], &[]] };
            head += match self.heads - head {
                4.. => self.dots_of::<S, 4, 2>(simd, head, keys, soon, logits),
                2.. => self.dots_of::<S, 2, 4>(simd, head, keys, soon, logits),
                _ => self.dots_of::<S, 1, 4>(simd, head, keys, soon, logits),
            };
        }
    }

    #[inline(always)]
    fn dots_of<S: Lanes, const H: usize, const N: usize>(
        &self,
        simd: S,
        head: usize,
        keys: &[&[E]],
        soon: [&[&[E]]; 2],
        logits: &mut [f32],
    ) -> usize {
        let mut q: [&[f32]; H] = [&[]; H];
        for (h, q) in q.iter_mut().enumerate() {
            *q = &self.q[(head + h) * self.dk..][..self.dk];
        }
        let (whole, rest) = keys.as_chunks::<N>();
        for (i, keys) in whole.iter().enumerate() {
            for rows in soon {
                for row in rows.iter().skip(i * N).take(N) {
                    prefetch(row);
                }
            }
            for (h, sums) in dot_tile::<S, E, H, N>(simd, q, *keys).iter().enumerate() {
                logits[(head + h) * BLOCK + i * N..][..N].copy_from_slice(sums);
            }
        }
        for (i, key) in rest.iter().enumerate() {
            for (h, sum) in dot_tile::<S, E, H, 1>(simd, q, [key]).iter().enumerate() {
                logits[(head + h) * BLOCK + whole.len() * N + i] = sum[0];
            }
        }
        H
    }

    /// o += weights · values.
    #[inline(always)]
    fn weigh<S: Lanes>(&self, simd: S, values: &[&[E]], weights: &[f32], o: &mut [f32]) {
        let mut head = 0;
        while head < self.heads {
            let weights = &weights[head * BLOCK..];
            let o = &mut o[head * self.dv..];
            head += match self.heads - head {
                4.. => self.weigh_of::<S, 4, 2>(simd, values, weights, o),
                2.. => self.weigh_of::<S, 2, 4>(simd, values, weights, o),
                _ => self.weigh_of::<S, 1, 8>(simd, values, weights, o),
            };
        }
    }

    #[inline(always)]
    fn weigh_of<S: Lanes, const H: usize, const N: usize>(
        &self,
        simd: S,
        values: &[&[E]],
        weights: &[f32],
        o: &mut [f32],
    ) -> usize {
        let mut d = 0;
        while d < self.dv {
            let left = (self.dv - d) / S::F32_LANES;
            d += if left >= N {
                self.weigh_tile::<S, H, N>(simd, d, values, weights, o)
            } else if left >= 2 {
                self.weigh_tile::<S, H, 2>(simd, d, values, weights, o)
            } else {
                self.weigh_tile::<S, H, 1>(simd, d, values, weights, o)
            };
        }
        H
    }

    #[inline(always)]
    fn weigh_tile<S: Lanes, const H: usize, const N: usize>(
        &self,
        simd: S,
        d: usize,
        values: &[&[E]],
        weights: &[f32],
        o: &mut [f32],
    ) -> usize {
        let lanes = S::F32_LANES;
        let mut sums = [[simd.splat_f32s(0.0); N]; H];
        for h in 0..H {
            for j in 0..N {
                sums[h][j] = simd.load(&o[h * self.dv + d + j * lanes..]);
            }
        }
        for (i, row) in values.iter().enumerate() {
            let row = &row[d..][..N * lanes];
            let mut value = [simd.splat_f32s(0.0); N];
            for j in 0..N {
                // SAFETY: the row was cut to N vectors.
                value[j] = unsafe { E::load_at(simd, row.as_ptr().add(j * lanes)) };
            }
            for h in 0..H {
                let weight = simd.splat_f32s(weights[h * BLOCK + i]);
                for j in 0..N {
                    sums[h][j] = simd.mul_add_e_f32s(weight, value[j], sums[h][j]);
                }
            }
        }
        for h in 0..H {
            for j in 0..N {
                simd.store(&mut o[h * self.dv + d + j * lanes..], sums[h][j]);
            }
        }
        N * lanes
    }
}

/// Inner products of H query rows and N keys.
#[inline(always)]
fn dot_tile<S: Lanes, E: Element, const H: usize, const N: usize>(
    simd: S,
    q: [&[f32]; H],
    keys: [&[E]; N],
) -> [[f32; N]; H] {
    let zero = simd.splat_f32s(0.0);
    let mut sums = [[zero; N]; H];
    let dk = q[0].len();
    for i in 0..N {
        assert!(keys[i].len() >= dk);
    }
    for h in 0..H {
        assert!(q[h].len() == dk);
    }
    assert!(dk.is_multiple_of(S::F32_LANES));
    for d in (0..dk).step_by(S::F32_LANES) {
        let mut key = [zero; N];
        for i in 0..N {
            // SAFETY: d and a vector more are inside every row, by the assertions.
            key[i] = unsafe { E::load_at(simd, keys[i].as_ptr().add(d)) };
        }
        for h in 0..H {
            // SAFETY: as above.
            let q = unsafe { f32::load_at(simd, q[h].as_ptr().add(d)) };
            for i in 0..N {
                sums[h][i] = simd.mul_add_e_f32s(q, key[i], sums[h][i]);
            }
        }
    }
    let mut out = [[0.0; N]; H];
    for h in 0..H {
        for i in 0..N {
            out[h][i] = simd.reduce_sum_f32s(sums[h][i]);
        }
    }
    out
}
