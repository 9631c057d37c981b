//! Small f32 matrix products over memory that is laid out for them: rows of B and C are whole vectors.

// Loops by index over arrays of constant length unroll into registers; iterators keep state in memory.
#![allow(clippy::needless_range_loop)]

use crate::engine::cpu::simd::Lanes;

/// A row-major matrix: elements and the distance between rows.
#[derive(Clone, Copy)]
pub(crate) struct Mat<'a> {
    pub data: &'a [f32],
    pub stride: usize,
}

/// C += A·B with A `[m, depth]`, B `[depth, n]`, C `[m, n]` of row distance `c_stride`; n is a multiple of
/// [`super::simd::ROW`].
#[inline(always)]
pub(crate) fn multiply_add<S: Lanes>(
    simd: S,
    [m, n, depth]: [usize; 3],
    a: Mat<'_>,
    b: Mat<'_>,
    c: &mut [f32],
    c_stride: usize,
) {
    if m == 0 || n == 0 || depth == 0 {
        return;
    }
    assert!(n.is_multiple_of(S::F32_LANES) && n <= c_stride && n <= b.stride && depth <= a.stride);
    assert!(a.data.len() >= (m - 1) * a.stride + depth);
    assert!(b.data.len() >= (depth - 1) * b.stride + n);
    assert!(c.len() >= (m - 1) * c_stride + n);
    let mut row = 0;
    while row < m {
        let strip = Strip {
            a: a.data[row * a.stride..].as_ptr(),
            a_stride: a.stride,
            b: b.data.as_ptr(),
            b_stride: b.stride,
            c: c[row * c_stride..].as_mut_ptr(),
            c_stride,
            depth,
        };
        // SAFETY: the assertions above hold every index of rows `row..row + M`, columns `..n` and `..depth` inside
        // the slices, M being at most the rows left.
        row += unsafe {
            match m - row {
                6.. if S::MANY_REGISTERS => strip.columns::<S, 6, 4>(simd, n),
                4.. => strip.columns::<S, 4, 2>(simd, n),
                2.. => strip.columns::<S, 2, 4>(simd, n),
                _ => strip.columns::<S, 1, 4>(simd, n),
            }
        };
    }
}

/// A few rows of A and C against all of B.
#[derive(Clone, Copy)]
struct Strip {
    a: *const f32,
    a_stride: usize,
    b: *const f32,
    b_stride: usize,
    c: *mut f32,
    c_stride: usize,
    depth: usize,
}

impl Strip {
    /// All columns of M rows; returns M.
    ///
    /// # Safety
    /// Rows `..M`, columns `..n` and depth `..depth` lie inside what the pointers may touch.
    #[inline(always)]
    unsafe fn columns<S: Lanes, const M: usize, const NV: usize>(self, simd: S, n: usize) -> usize {
        let mut col = 0;
        while col < n {
            let left = (n - col) / S::F32_LANES;
            // SAFETY: a tile ends at most at column n.
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
        M
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
                    let a = simd.splat_f32s(*self.a.add(i * self.a_stride + d));
                    for j in 0..NV {
                        sum[i][j] = simd.mul_add_e_f32s(a, b[j], sum[i][j]);
                    }
                }
            }
            for i in 0..M {
                for j in 0..NV {
                    let c = self.c.add(i * self.c_stride + col + j * lanes).cast::<S::f32s>();
                    c.write_unaligned(simd.add_f32s(c.read_unaligned(), sum[i][j]));
                }
            }
        }
        NV * lanes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::engine::cpu::simd::{Kernel, Level};

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
}
