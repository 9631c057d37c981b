//! Masses of buckets: prefix sums along a tile, the normalisations and their derivative, and sums in f64. Tokens lie in
//! lanes; everything is `[buckets, np]`.

use crate::engine::cpu::simd::{Kernel, Lanes, ROW};

/// Row j is 1 from column j on.
const FROM: [[f32; ROW]; ROW] = triangle(true);
/// Row j is 1 up to column j.
const UP_TO: [[f32; ROW]; ROW] = triangle(false);

const fn triangle(from: bool) -> [[f32; ROW]; ROW] {
    let mut out = [[0.0; ROW]; ROW];
    let (mut j, mut i) = (0, 0);
    while j < ROW {
        while i < ROW {
            if (from && i >= j) || (!from && i <= j) {
                out[j][i] = 1.0;
            }
            i += 1;
        }
        (j, i) = (j + 1, 0);
    }
    out
}

/// The sum of each prefix of φ on top of a mass: what each token reads; and the sum of all.
pub(super) struct Prefixes<'a> {
    pub np: usize,
    pub phi: &'a [f32],
    pub start: &'a [f32],
    pub out: &'a mut [f32],
    pub total: &'a mut [f32],
}

impl Kernel for Prefixes<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { np, phi, start, out, total } = self;
        let rows = phi.chunks_exact(np).zip(out.chunks_exact_mut(np));
        for (((phi, out), start), total) in rows.zip(start).zip(total) {
            let base = simd.splat_f32s(*start);
            *total = 0.0;
            for col in (0..np).step_by(S::F32_LANES) {
                // From zero: a large mass would swallow single weights.
                let mut sum = simd.splat_f32s(*total);
                for (x, from) in phi[col..][..S::F32_LANES].iter().zip(&FROM) {
                    sum = simd.mul_add_e_f32s(simd.splat_f32s(*x), simd.load(from), sum);
                }
                simd.store(&mut out[col..], sum);
                *total = out[col + S::F32_LANES - 1];
                simd.store(&mut out[col..], simd.add_f32s(base, sum));
            }
        }
    }
}

/// Adds the sum of each suffix of x to `out`, and of all to `total`.
pub(super) struct Suffixes<'a> {
    pub np: usize,
    pub x: &'a [f32],
    pub out: &'a mut [f32],
    pub total: &'a mut [f32],
}

impl Kernel for Suffixes<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { np, x, out, total } = self;
        let mut first = [0.0; ROW];
        for ((x, out), total) in x.chunks_exact(np).zip(out.chunks_exact_mut(np)).zip(total) {
            let mut later = 0.0;
            for col in (0..np).step_by(S::F32_LANES).rev() {
                let mut sum = simd.splat_f32s(later);
                for (x, up_to) in x[col..][..S::F32_LANES].iter().zip(&UP_TO) {
                    sum = simd.mul_add_e_f32s(simd.splat_f32s(*x), simd.load(up_to), sum);
                }
                simd.store(&mut first, sum);
                later = first[0];
                let before = simd.load(&out[col..]);
                simd.store(&mut out[col..], simd.add_f32s(before, sum));
            }
            *total += later;
        }
    }
}

/// Adds the sum of each row of x to `total`.
pub(super) struct Totals<'a> {
    pub np: usize,
    pub x: &'a [f32],
    pub total: &'a mut [f32],
}

impl Kernel for Totals<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        for (x, total) in self.x.chunks_exact(self.np).zip(self.total) {
            let mut sum = simd.splat_f32s(0.0);
            for col in (0..self.np).step_by(S::F32_LANES) {
                sum = simd.add_f32s(sum, simd.load(&x[col..]));
            }
            *total += simd.reduce_sum_f32s(sum);
        }
    }
}

/// How a query's weights are normalised.
#[derive(Clone, Copy)]
pub(super) struct Norm {
    pub ratio: bool,
    pub share: f32,
    pub np: usize,
}

const EPSILON: f32 = crate::Normalization::EPSILON as f32;

/// φ(q) to ψ, in place: o = Σ_s ψ_s·B_s. Ratio: φ/(φ·A), or nothing where there is no mass to divide by; buckets:
/// share·φ/(A + ε).
pub(super) struct Weigh<'a> {
    pub norm: Norm,
    pub psi: &'a mut [f32],
    pub mass: &'a [f32],
}

impl Kernel for Weigh<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { norm: Norm { ratio, share, np }, psi, mass } = self;
        let end = mass.len().min(psi.len());
        let (zero, one) = (simd.splat_f32s(0.0), simd.splat_f32s(1.0));
        let (share, epsilon) = (simd.splat_f32s(share), simd.splat_f32s(EPSILON));
        for col in (0..np).step_by(S::F32_LANES) {
            if ratio {
                let mut d = zero;
                for at in (col..end).step_by(np) {
                    d = simd.mul_add_e_f32s(simd.load(&psi[at..]), simd.load(&mass[at..]), d);
                }
                let some = simd.greater_than_or_equal_f32s(d, simd.splat_f32s(f32::MIN_POSITIVE));
                let inverse = simd.select_f32s(some, simd.div_f32s(one, d), zero);
                for at in (col..end).step_by(np) {
                    let x = simd.mul_f32s(simd.load(&psi[at..]), inverse);
                    simd.store(&mut psi[at..], x);
                }
            } else {
                for at in (col..end).step_by(np) {
                    let weight = simd.div_f32s(share, simd.add_f32s(simd.load(&mass[at..]), epsilon));
                    let x = simd.mul_f32s(simd.load(&psi[at..]), weight);
                    simd.store(&mut psi[at..], x);
                }
            }
        }
    }
}

/// Back through [`Weigh`], given y_s = grad_o·B_s: `y` becomes h = dφ∘φ, `dmass` the gradient of the masses read.
///
/// Ratio: δ = −Σ ψ·y, dψ = y + δ·A, dA = ψ·δ. Buckets: dψ = y, dA = −dψ·ψ/(A + ε). Both: dφ∘φ = dψ∘ψ, so 1/D never
/// stands alone.
pub(super) struct WeighBackward<'a> {
    pub norm: Norm,
    pub psi: &'a [f32],
    pub mass: &'a [f32],
    pub y: &'a mut [f32],
    pub dmass: &'a mut [f32],
}

impl Kernel for WeighBackward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { norm: Norm { ratio, np, .. }, psi, mass, y, dmass } = self;
        let end = mass.len().min(psi.len());
        let zero = simd.splat_f32s(0.0);
        let epsilon = simd.splat_f32s(EPSILON);
        for col in (0..np).step_by(S::F32_LANES) {
            if ratio {
                let mut sum = zero;
                for at in (col..end).step_by(np) {
                    sum = simd.mul_add_e_f32s(simd.load(&psi[at..]), simd.load(&y[at..]), sum);
                }
                let delta = simd.neg_f32s(sum);
                for at in (col..end).step_by(np) {
                    let psi = simd.load(&psi[at..]);
                    let dpsi = simd.mul_add_e_f32s(delta, simd.load(&mass[at..]), simd.load(&y[at..]));
                    simd.store(&mut y[at..], simd.mul_f32s(dpsi, psi));
                    simd.store(&mut dmass[at..], simd.mul_f32s(psi, delta));
                }
            } else {
                for at in (col..end).step_by(np) {
                    let h = simd.mul_f32s(simd.load(&psi[at..]), simd.load(&y[at..]));
                    simd.store(&mut y[at..], h);
                    let d = simd.div_f32s(h, simd.add_f32s(simd.load(&mass[at..]), epsilon));
                    simd.store(&mut dmass[at..], simd.neg_f32s(d));
                }
            }
        }
    }
}

/// x *= y.
pub(super) struct Scale<'a>(pub &'a mut [f32], pub &'a [f32]);

impl Kernel for Scale<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        self.0.iter_mut().zip(self.1).for_each(|(x, y)| *x *= y);
    }
}

/// Adds f32 rows of `row` elements to f64 rows of `dim`, and rounds those to f32 rows of `row` elements where asked.
pub(super) struct Flush<'a> {
    pub dim: usize,
    pub row: usize,
    pub wide: &'a mut [f64],
    pub delta: &'a [f32],
    pub narrow: Option<&'a mut [f32]>,
}

impl Kernel for Flush<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { dim, row, wide, delta, narrow } = self;
        for (wide, delta) in wide.chunks_exact_mut(dim).zip(delta.chunks_exact(row)) {
            wide.iter_mut().zip(delta).for_each(|(x, d)| *x += f64::from(*d));
        }
        if let Some(narrow) = narrow {
            for (wide, narrow) in wide.chunks_exact(dim).zip(narrow.chunks_exact_mut(row)) {
                narrow.iter_mut().zip(wide).for_each(|(x, w)| *x = *w as f32);
            }
        }
    }
}
