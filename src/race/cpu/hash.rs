//! The soft hash of a tile, and its derivative: tokens lie in lanes.

// Loops by index over arrays of constant length unroll into registers; iterators keep state in memory.
#![allow(clippy::needless_range_loop)]

use crate::engine::cpu::simd::{Kernel, Lanes};

/// Hyperplanes of a table at most.
const MAX_PLANES: usize = 8;

/// What the derivative needs of a forward hash, each `[bits, np]`: t = tanh(u), dt/du, and the mean m = tanh(β·t) of a
/// corner's sign.
pub(super) struct Slopes<'a> {
    pub t: &'a mut [f32],
    pub slope: &'a mut [f32],
    pub mean: &'a mut [f32],
}

impl<'a> Slopes<'a> {
    /// Three parts of `one` elements.
    pub fn of(all: &'a mut [f32], one: usize) -> Self {
        let (t, rest) = all[..3 * one].split_at_mut(one);
        let (slope, mean) = rest.split_at_mut(one);
        Self { t, slope, mean }
    }
}

/// Projections u, `[tables * planes, np]`, to bucket weights φ, `[tables, 2^planes, np]`: φ_r = Π_p σ(±2β·tanh(u_p)),
/// built plane by plane, so that buckets share their leading factors.
pub(super) struct Soften<'a> {
    pub tables: usize,
    pub planes: usize,
    pub np: usize,
    pub beta: f32,
    pub u: &'a [f32],
    pub phi: &'a mut [f32],
    pub slopes: Option<Slopes<'a>>,
}

impl Kernel for Soften<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { tables, planes, np, beta, u, phi, mut slopes } = self;
        let (zero, one, four) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0), simd.splat_f32s(4.0));
        let (minus_two, minus_two_beta) = (simd.splat_f32s(-2.0), simd.splat_f32s(-2.0 * beta));
        let sign = simd.splat_u32s(0x8000_0000);
        for table in 0..tables {
            let phi = &mut phi[(table << planes) * np..][..np << planes];
            for col in (0..np).step_by(S::F32_LANES) {
                // σ(2βt) and σ(−2βt) of each plane.
                let (mut above, mut below) = ([zero; MAX_PLANES], [zero; MAX_PLANES]);
                for p in 0..planes {
                    let at = (table * planes + p) * np + col;
                    let u = simd.load(&u[at..]);
                    let negative = simd.and_u32s(simd.transmute_u32s_f32s(u), sign);
                    let e = simd.exp(simd.mul_f32s(minus_two, simd.magnitude(u)));
                    let r = simd.div_f32s(one, simd.add_f32s(one, e));
                    let t = simd.mul_f32s(simd.sub_f32s(one, e), r);
                    let f = simd.exp(simd.mul_f32s(minus_two_beta, t));
                    let large = simd.div_f32s(one, simd.add_f32s(one, f));
                    let small = simd.mul_f32s(f, large);
                    let is_above = simd.greater_than_or_equal_f32s(u, zero);
                    above[p] = simd.select_f32s(is_above, large, small);
                    below[p] = simd.select_f32s(is_above, small, large);
                    if let Some(slopes) = &mut slopes {
                        let signed_t = simd.or_u32s(simd.transmute_u32s_f32s(t), negative);
                        simd.store(&mut slopes.t[at..], simd.transmute_f32s_u32s(signed_t));
                        let slope = simd.mul_f32s(simd.mul_f32s(four, e), simd.mul_f32s(r, r));
                        simd.store(&mut slopes.slope[at..], slope);
                        let mean = simd.mul_f32s(simd.sub_f32s(one, f), large);
                        let signed_mean = simd.or_u32s(simd.transmute_u32s_f32s(mean), negative);
                        simd.store(&mut slopes.mean[at..], simd.transmute_f32s_u32s(signed_mean));
                    }
                }
                simd.store(&mut phi[col..], below[0]);
                simd.store(&mut phi[np + col..], above[0]);
                for p in 1..planes {
                    for r in (0..1 << p).rev() {
                        let x = simd.load(&phi[r * np + col..]);
                        simd.store(&mut phi[(2 * r + 1) * np + col..], simd.mul_f32s(x, above[p]));
                        simd.store(&mut phi[2 * r * np + col..], simd.mul_f32s(x, below[p]));
                    }
                }
            }
        }
    }
}

/// h = dφ∘φ, `[tables, 2^planes, np]` (overwritten), to du, `[tables * planes, np]`; gives dβ.
///
/// s_p = Σ_r (c_rp − m_p)·h_r, where the sums over corners fold plane by plane; du = β·s·dt/du, dβ = Σ t·s.
pub(super) struct Harden<'a> {
    pub tables: usize,
    pub planes: usize,
    pub np: usize,
    pub beta: f32,
    pub h: &'a mut [f32],
    pub slopes: &'a Slopes<'a>,
    pub du: &'a mut [f32],
}

impl Kernel for Harden<'_> {
    type Output = f32;
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> f32 {
        let Self { tables, planes, np, beta, h, slopes, du } = self;
        let zero = simd.splat_f32s(0.0);
        let beta = simd.splat_f32s(beta);
        let mut dbeta = zero;
        for table in 0..tables {
            let h = &mut h[(table << planes) * np..][..np << planes];
            for col in (0..np).step_by(S::F32_LANES) {
                let mut differences = [zero; MAX_PLANES];
                for p in (0..planes).rev() {
                    let mut difference = zero;
                    for r in 0..1 << p {
                        let below = simd.load(&h[2 * r * np + col..]);
                        let above = simd.load(&h[(2 * r + 1) * np + col..]);
                        difference = simd.add_f32s(difference, simd.sub_f32s(above, below));
                        simd.store(&mut h[r * np + col..], simd.add_f32s(below, above));
                    }
                    differences[p] = difference;
                }
                let total = simd.load(&h[col..]);
                for p in 0..planes {
                    let at = (table * planes + p) * np + col;
                    let expected = simd.mul_f32s(simd.load(&slopes.mean[at..]), total);
                    let s = simd.sub_f32s(differences[p], expected);
                    dbeta = simd.mul_add_e_f32s(simd.load(&slopes.t[at..]), s, dbeta);
                    let slope = simd.load(&slopes.slope[at..]);
                    simd.store(&mut du[at..], simd.mul_f32s(simd.mul_f32s(beta, s), slope));
                }
            }
        }
        simd.reduce_sum_f32s(dbeta)
    }
}
