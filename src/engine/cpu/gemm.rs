//! Small f32 matrix products over memory that is laid out for them: rows of B and C are whole vectors.

// Loops by index over arrays of constant length unroll into registers; iterators keep state in memory.
#![allow(clippy::needless_range_loop)]

use crate::engine::cpu::simd::{Kernel, Lanes, ROW};

/// A row-major matrix: elements and the distance between rows.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// What is known of a product's triangles, so that half of the work can be left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Band {
    /// Nothing.
    Full,
    /// A is zero above its diagonal.
    LowerA,
    /// A is zero below its diagonal.
    UpperA,
    /// C is of use on and above its diagonal only; what is left below is arbitrary.
    UpperC,
}

/// How a product reads A and writes C.
#[derive(Clone, Copy, Debug)]
struct Manner {
    /// A is given as `[depth, m]`.
    transposed: bool,
    /// C is written, not added to.
    fresh: bool,
    band: Band,
}

/// C += A·B with A `[m, depth]`, B `[depth, n]`, C `[m, n]` of row distance `c_stride`; n is a multiple of
/// [`super::simd::ROW`].
#[inline(always)]
pub(crate) fn multiply_add<S: Lanes>(
    simd: S,
    size: [usize; 3],
    a: Mat<'_>,
    b: Mat<'_>,
    c: &mut [f32],
    c_stride: usize,
) {
    multiply(simd, size, a, b, c, c_stride, Manner { transposed: false, fresh: false, band: Band::Full });
}

/// [`multiply_add`] as a kernel of its own, with A in either order and half of the work left out where it can be.
pub(crate) struct Product<'a> {
    /// m, n and depth.
    pub size: [usize; 3],
    /// `[m, depth]`, or `[depth, m]` where `transposed`.
    pub a: Mat<'a>,
    pub transposed: bool,
    pub b: Mat<'a>,
    pub c: &'a mut [f32],
    pub c_stride: usize,
    /// C = A·B rather than C += A·B.
    pub fresh: bool,
    pub band: Band,
}

impl Kernel for Product<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { size, a, transposed, b, c, c_stride, fresh, band } = self;
        multiply(simd, size, a, b, c, c_stride, Manner { transposed, fresh, band });
    }
}

#[inline(always)]
fn multiply<S: Lanes>(
    simd: S,
    [m, n, depth]: [usize; 3],
    a: Mat<'_>,
    b: Mat<'_>,
    c: &mut [f32],
    c_stride: usize,
    Manner { transposed, fresh, band }: Manner,
) {
    if m == 0 || n == 0 || (depth == 0 && !fresh) {
        return;
    }
    let [rows, row] = if transposed { [depth, m] } else { [m, depth] };
    let reach = |rows: usize, stride: usize, row: usize| if rows == 0 { 0 } else { (rows - 1) * stride + row };
    assert!(n.is_multiple_of(S::F32_LANES) && n <= c_stride && n <= b.stride && row <= a.stride);
    assert!(a.data.len() >= reach(rows, a.stride, row) && b.data.len() >= reach(depth, b.stride, n));
    assert!(c.len() >= reach(m, c_stride, n));
    let (a_stride, a_step) = if transposed { (1, a.stride) } else { (a.stride, 1) };
    let mut row = 0;
    while row < m {
        let count = match m - row {
            6.. if S::MANY_REGISTERS => 6,
            4.. => 4,
            2.. => 2,
            _ => 1,
        };
        let (start, end) = match band {
            Band::LowerA => (0, depth.min(row + count)),
            Band::UpperA => (depth.min(row), depth),
            Band::Full | Band::UpperC => (0, depth),
        };
        let strip = Strip {
            a: a.data.as_ptr().wrapping_add(row * a_stride + start * a_step),
            a_stride,
            a_step,
            b: b.data.as_ptr().wrapping_add(start * b.stride),
            b_stride: b.stride,
            c: c[row * c_stride..].as_mut_ptr(),
            c_stride,
            depth: end - start,
            fresh,
        };
        let columns = if band == Band::UpperC { (row / ROW * ROW).min(n)..n } else { 0..n };
        // SAFETY: the assertions above hold every index of rows `row..row + count`, columns `..n` and `..depth`
        // inside the slices, `count` being at most the rows left.
        unsafe {
            match count {
                6 => strip.columns::<S, 6, 4>(simd, columns),
                4 => strip.columns::<S, 4, 2>(simd, columns),
                2 => strip.columns::<S, 2, 4>(simd, columns),
                _ => strip.columns::<S, 1, 4>(simd, columns),
            }
        }
        row += count;
    }
}

/// A few rows of A and C against all of B.
#[derive(Clone, Copy)]
struct Strip {
    a: *const f32,
    a_stride: usize,
    /// Distance between neighbours in depth.
    a_step: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    depth: usize,
    fresh: bool,
}

impl Strip {
    /// A range of columns of M rows.
    ///
    /// # Safety
    /// Rows `..M`, columns up to the range's end and depth `..depth` lie inside what the pointers may touch.
    #[inline(always)]
    unsafe fn columns<S: Lanes, const M: usize, const NV: usize>(self, simd: S, columns: std::ops::Range<usize>) {
        let mut col = columns.start;
        while col < columns.end {
            let left = (columns.end - col) / S::F32_LANES;
            // SAFETY: a tile ends at most at the last column.
            col += unsafe {
                if left >= NV {
                    self.tile::<S, M, NV>(simd, col)
                } else if left >= 2 {
                    self.tile::<S, M, 2>(simd, col)
                } else {
                    self.tile::<S, M, 1>(simd, col)
                }
            };
        }
    }

    /// M rows and NV vectors of C, held in registers over the whole depth; returns the columns done.
    ///
    /// # Safety
    /// As [`Strip::columns`] for the columns of the tile.
    #[inline(always)]
    unsafe fn tile<S: Lanes, const M: usize, const NV: usize>(self, simd: S, col: usize) -> usize {
        let lanes = S::F32_LANES;
        // SAFETY: the caller vouches for all rows, columns and depths; unaligned accesses are used throughout.
        unsafe {
            let zero = simd.splat_f32s(0.0);
            let mut sum = [[zero; NV]; M];
            for d in 0..self.depth {
                let row = self.b.add(d * self.b_stride + col);
                let mut b = [zero; NV];
                for j in 0..NV {
                    b[j] = row.add(j * lanes).cast::<S::f32s>().read_unaligned();
                }
                for i in 0..M {
                    let a = simd.splat_f32s(*self.a.add(i * self.a_stride + d * self.a_step));
                    for j in 0..NV {
                        sum[i][j] = simd.mul_add_e_f32s(a, b[j], sum[i][j]);
                    }
                }
            }
            for i in 0..M {
                for j in 0..NV {
                    let c = self.c.add(i * self.c_stride + col + j * lanes).cast::<S::f32s>();
                    let sum = sum[i][j];
                    c.write_unaligned(if self.fresh { sum } else { simd.add_f32s(c.read_unaligned(), sum) });
                }
            }
        }
        NV * lanes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::simd::Level;

    struct Multiply<'a>([usize; 3], &'a [f32], &'a [f32], &'a mut [f32]);

    impl Kernel for Multiply<'_> {
        type Output = ();
        #[inline(always)]
        fn run<S: Lanes>(self, simd: S) {
            let Self([m, n, depth], a, b, c) = self;
            let (a, b) = (Mat { data: a, stride: depth + 3 }, Mat { data: b, stride: n + 5 });
            multiply_add(simd, [m, n, depth], a, b, c, n + 2);
        }
    }

    /// Small whole numbers, so that every order of summation is exact.
    #[test]
    fn every_level_and_remainder() {
        for level in Level::available() {
            for m in [0, 1, 2, 3, 4, 5, 6, 7, 11, 12, 13] {
                for n in [16, 32, 48, 64, 80, 144] {
                    for depth in [0, 1, 5, 64] {
                        let whole = |i: usize| ((i * 7919 + 13) % 17) as f32 - 8.0;
                        let a: Vec<f32> = (0..m.max(1) * (depth + 3)).map(whole).collect();
                        let b: Vec<f32> = (0..depth.max(1) * (n + 5)).map(|i| whole(i + 5)).collect();
                        let mut c: Vec<f32> = (0..m.max(1) * (n + 2)).map(whole).collect();
                        let mut expected = c.clone();
                        for i in 0..m {
                            for j in 0..n {
                                let dot = (0..depth).map(|d| a[i * (depth + 3) + d] * b[d * (n + 5) + j]).sum::<f32>();
                                expected[i * (n + 2) + j] += dot;
                            }
                        }
                        level.run(Multiply([m, n, depth], &a, &b, &mut c));
                        assert_eq!(c, expected, "{level:?} {m} {n} {depth}");
                    }
                }
            }
        }
    }

    /// Both orders of A, fresh and added, and the triangles: what may be skipped is skipped, nothing else.
    #[test]
    fn products_in_every_manner() {
        let whole = |i: usize| ((i * 7919 + 13) % 17) as f32 - 8.0;
        for level in Level::available() {
            for (m, n, depth) in [(1, 16, 1), (5, 16, 5), (13, 16, 16), (32, 32, 32), (31, 64, 31), (6, 128, 0)] {
                for band in [Band::Full, Band::LowerA, Band::UpperA, Band::UpperC] {
                    for (transposed, fresh) in [(false, false), (false, true), (true, false), (true, true)] {
                        let kept = |i: usize, d: usize| match band {
                            Band::LowerA => d <= i,
                            Band::UpperA => d >= i,
                            _ => true,
                        };
                        let of_a = |i: usize, d: usize| if kept(i, d) { whole(3 * i + 5 * d) } else { 0.0 };
                        let stride = m.max(depth) + 3;
                        let mut a = vec![0.0; stride * stride];
                        for i in 0..m {
                            for d in 0..depth {
                                a[if transposed { d * stride + i } else { i * stride + d }] = of_a(i, d);
                            }
                        }
                        let b: Vec<f32> = (0..depth * n).map(|i| whole(i + 5)).collect();
                        let before: Vec<f32> = (0..m * n).map(whole).collect();
                        let mut c = before.clone();
                        let (a, b) = (Mat { data: &a, stride }, Mat { data: &b, stride: n });
                        let size = [m, n, depth];
                        level.run(Product { size, a, transposed, b, c: &mut c, c_stride: n, fresh, band });
                        for i in 0..m {
                            for j in (if band == Band::UpperC { i } else { 0 })..n {
                                let dot: f32 = (0..depth).map(|d| of_a(i, d) * b.data[d * n + j]).sum();
                                let expected = dot + if fresh { 0.0 } else { before[i * n + j] };
                                assert_eq!(c[i * n + j], expected, "{level:?} {size:?} {band:?} {transposed} {i} {j}");
                            }
                        }
                    }
                }
            }
        }
    }
}
