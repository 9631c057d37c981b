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
    /// What the shares of all buckets add up to.
    pub shares: f32,
    pub np: usize,
}

const EPSILON: f32 = crate::Normalization::EPSILON as f32;

/// φ(q) to ψ, in place: o = Σ_s ψ_s·B_s. Ratio: φ/(φ·A), or nothing where there is no mass to divide by; buckets:
/// share·φ/(A + ε). And Σ_s ψ_s·A_s of each token, without the rounding of a sum: 1, or share·L − ε·Σψ.
pub(super) struct Weigh<'a> {
    pub norm: Norm,
    pub psi: &'a mut [f32],
    pub mass: &'a [f32],
    pub whole: &'a mut [f32],
}

impl Kernel for Weigh<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { norm: Norm { ratio, share, shares, np }, psi, mass, whole } = self;
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
                simd.store(&mut whole[col..], simd.select_f32s(some, one, zero));
            } else {
                let mut sum = zero;
                for at in (col..end).step_by(np) {
                    let weight = simd.div_f32s(share, simd.add_f32s(simd.load(&mass[at..]), epsilon));
                    let x = simd.mul_f32s(simd.load(&psi[at..]), weight);
                    simd.store(&mut psi[at..], x);
                    sum = simd.add_f32s(sum, x);
                }
                let lost = simd.mul_f32s(epsilon, sum);
                simd.store(&mut whole[col..], simd.sub_f32s(simd.splat_f32s(shares), lost));
            }
        }
    }
}

/// Back through [`Weigh`], given y_s = grad_o·B_s: `y` becomes h = dφ∘φ, `dmass` the gradient of the masses read.
///
/// Ratio: δ = −Σ ψ·y, dψ = y + δ·A, dA = ψ·δ. Buckets: dψ = y, dA = −dψ·ψ/(A + ε). Both: dφ∘φ = dψ∘ψ, so 1/D never
/// stands alone. With B less A·c for B, and γ = grad_o·c: the ratio's dψ is the same and its δ larger by γ; a bucket's
/// dψ is y − ε·γ but for a multiple of A + ε, of which a hash makes nothing, and its dA larger by ψ·γ. So both give the
/// gradient of A with B less A·c held.
pub(super) struct WeighBackward<'a> {
    pub norm: Norm,
    pub psi: &'a [f32],
    pub mass: &'a [f32],
    /// γ of each token.
    pub common: &'a [f32],
    pub y: &'a mut [f32],
    pub dmass: &'a mut [f32],
}

impl Kernel for WeighBackward<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { norm: Norm { ratio, np, .. }, psi, mass, common, y, dmass } = self;
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
                let lost = simd.mul_f32s(epsilon, simd.load(&common[col..]));
                for at in (col..end).step_by(np) {
                    let dpsi = simd.sub_f32s(simd.load(&y[at..]), lost);
                    let h = simd.mul_f32s(simd.load(&psi[at..]), dpsi);
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

/// x − c for each row of x.
pub(super) struct Shift<'a> {
    pub x: &'a [f32],
    pub c: &'a [f32],
    pub out: &'a mut [f32],
}

impl Kernel for Shift<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let row = self.c.len();
        for (x, out) in self.x.chunks_exact(row).zip(self.out.chunks_exact_mut(row)) {
            x.iter().zip(self.c).zip(out).for_each(|((x, c), out)| *out = x - c);
        }
    }
}

/// Adds f32 rows of `row` elements to f64 rows of `dim`.
pub(super) struct Flush<'a> {
    pub dim: usize,
    pub row: usize,
    pub wide: &'a mut [f64],
    pub delta: &'a [f32],
}

impl Kernel for Flush<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        for (wide, delta) in self.wide.chunks_exact_mut(self.dim).zip(self.delta.chunks_exact(self.row)) {
            wide.iter_mut().zip(delta).for_each(|(x, d)| *x += f64::from(*d));
        }
    }
}

/// Mass from which on a state's mean value means something: that of half a token.
const SOME: f64 = 0.5;

/// A state in f64 to A, the mean value c, and B less A·c, in f32 rows of `row` elements. What all buckets have in
/// common would else drown what they differ in. Any c is right; this one is the first ensemble's mean.
pub(super) struct Center<'a> {
    pub buckets: usize,
    pub dim: usize,
    pub row: usize,
    pub a: &'a [f64],
    pub b: &'a [f64],
    pub to_a: &'a mut [f32],
    pub c: &'a mut [f32],
    pub to_b: &'a mut [f32],
}

impl Kernel for Center<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        const COLUMNS: usize = 64;
        let Self { buckets, dim, row, a, b, to_a, c, to_b } = self;
        let mass: f64 = a[..buckets].iter().sum();
        let scale = if mass >= SOME { 1.0 / mass } else { 0.0 };
        for first in (0..dim).step_by(COLUMNS) {
            let columns = first..dim.min(first + COLUMNS);
            let mut sums = [0.0; COLUMNS];
            for b in b.chunks_exact(dim).take(buckets) {
                sums.iter_mut().zip(&b[columns.clone()]).for_each(|(sum, b)| *sum += b);
            }
            c[columns].iter_mut().zip(sums).for_each(|(c, sum)| *c = (sum * scale) as f32);
        }
        let c = &c[..dim];
        for (((a, b), to_a), to_b) in a.iter().zip(b.chunks_exact(dim)).zip(to_a).zip(to_b.chunks_exact_mut(row)) {
            *to_a = *a as f32;
            b.iter().zip(c).zip(to_b).for_each(|((b, c), to)| *to = (b - a * f64::from(*c)) as f32);
        }
    }
}

/// Σ x·c.
#[inline(always)]
fn dot(x: &[f64], c: &[f32]) -> f64 {
    const WAYS: usize = 8;
    let mut sums = [0.0; WAYS];
    let (whole, rest) = x.as_chunks::<WAYS>();
    let (whole_c, rest_c) = c.as_chunks::<WAYS>();
    for (x, c) in whole.iter().zip(whole_c) {
        for i in 0..WAYS {
            sums[i] += x[i] * f64::from(c[i]);
        }
    }
    let rest: f64 = rest.iter().zip(rest_c).map(|(x, c)| x * f64::from(*c)).sum();
    sums.iter().sum::<f64>() + rest
}

/// The gradient of a state in f64 to that of A with B less A·c held, RA + RB·c, and RB, in f32.
pub(super) struct CenterGradient<'a> {
    pub dim: usize,
    pub row: usize,
    pub a: &'a [f64],
    pub b: &'a [f64],
    pub c: &'a [f32],
    pub to_a: &'a mut [f32],
    pub to_b: &'a mut [f32],
}

impl Kernel for CenterGradient<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { dim, row, a, b, c, to_a, to_b } = self;
        for (((a, b), to_a), to_b) in a.iter().zip(b.chunks_exact(dim)).zip(to_a).zip(to_b.chunks_exact_mut(row)) {
            *to_a = (a + dot(b, &c[..dim])) as f32;
            b.iter().zip(to_b).for_each(|(b, to)| *to = *b as f32);
        }
    }
}

/// Adds what a chunk sends, the gradient of A with B less A·c held and that of B, to gradients of A and B in f64.
pub(super) struct FlushGradient<'a> {
    pub dim: usize,
    pub row: usize,
    pub a: &'a mut [f64],
    pub b: &'a mut [f64],
    pub c: &'a [f32],
    pub delta_a: &'a [f32],
    pub delta_b: &'a [f32],
}

impl Kernel for FlushGradient<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { dim, row, a, b, c, delta_a, delta_b } = self;
        let of_b = b.chunks_exact_mut(dim).zip(delta_b.chunks_exact(row));
        for ((a, delta_a), (b, delta_b)) in a.iter_mut().zip(delta_a).zip(of_b) {
            let mut common = [0.0; 8];
            for ((i, (b, d)), c) in b.iter_mut().zip(delta_b).enumerate().zip(c) {
                let d = f64::from(*d);
                *b += d;
                common[i % 8] += d * f64::from(*c);
            }
            *a += f64::from(*delta_a) - common.iter().sum::<f64>();
        }
    }
}
