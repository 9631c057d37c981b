//! Matrix products over row-major slices.

use gemm::{Parallelism, gemm};

/// A matrix inside a slice.
#[derive(Clone, Copy)]
pub struct View<'a> {
    data: &'a [f32],
    rows: usize,
    columns: usize,
    row_stride: usize,
    column_stride: usize,
}

impl<'a> View<'a> {
    /// All of `data`, row-major.
    pub fn new(data: &'a [f32], columns: usize) -> Self {
        Self { data, rows: data.len() / columns, columns, row_stride: columns, column_stride: 1 }
    }

    /// Rows that lie `row_stride` elements apart, from the first element of `data` on.
    pub fn strided(data: &'a [f32], rows: usize, columns: usize, row_stride: usize) -> Self {
        Self { data, rows, columns, row_stride, column_stride: 1 }
    }

    /// Its transpose.
    pub fn transposed(self) -> Self {
        let Self { data, rows, columns, row_stride, column_stride } = self;
        Self { data, rows: columns, columns: rows, row_stride: column_stride, column_stride: row_stride }
    }

    fn extent(&self) -> usize {
        (self.rows - 1) * self.row_stride + (self.columns - 1) * self.column_stride + 1
    }
}

/// out = keep·out + a·b, where rows of `out` lie `stride` elements apart.
pub fn multiply(a: View<'_>, b: View<'_>, out: &mut [f32], stride: usize, keep: f32) {
    assert_eq!(a.columns, b.rows, "the inner sizes of a product differ");
    assert!(a.rows > 0 && a.columns > 0 && b.columns > 0, "a product of nothing");
    assert!(a.extent() <= a.data.len() && b.extent() <= b.data.len(), "a factor leaves its slice");
    assert!((a.rows - 1) * stride + b.columns <= out.len(), "the product leaves its slice");
    // SAFETY: the assertions keep every element that sizes and strides reach inside its slice; `out` is borrowed
    // mutably, so it overlaps neither factor.
    unsafe {
        gemm(
            a.rows,
            b.columns,
            a.columns,
            out.as_mut_ptr(),
            1,
            stride as isize,
            keep != 0.0,
            a.data.as_ptr(),
            a.column_stride as isize,
            a.row_stride as isize,
            b.data.as_ptr(),
            b.column_stride as isize,
            b.row_stride as isize,
            keep,
            1.0,
            false,
            false,
            false,
            // Runs go in parallel, one thread each.
            Parallelism::None,
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn product_and_its_strides() {
        let (a, b) = ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0, -1.0, 2.0, 0.5, 3.0, 1.0]);
        let mut out = [7.0; 5];
        multiply(View::new(&a, 3), View::new(&b, 2), &mut out, 3, 0.0);
        assert_eq!(out, [14.0, 3.0, 7.0, 32.0, 4.5]);
        multiply(View::new(&a, 3), View::strided(&b, 2, 3, 3).transposed(), &mut out, 3, 1.0);
        assert_eq!(out, [14.0 + 5.0, 3.0 + 9.5, 7.0, 32.0 + 11.0, 4.5 + 23.0]);
    }
}
