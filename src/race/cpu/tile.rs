//! Tokens into tiles of f32, and tiles into results.

use crate::engine::cpu::memory::zeros;
use crate::engine::cpu::simd::{Element, Kernel, Lanes, Level, ROW, prefetch_far};
use crate::error::Result;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use crate::tensor::convert::on_gpu;
use crate::tensor::{DType, Storage, Tensor, TensorView};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use std::marker::PhantomData;

#[derive(Clone, Copy)]
enum Slice<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
}

/// A host tensor, read by rows.
#[derive(Clone, Copy)]
pub(super) struct Source<'a> {
    slice: Slice<'a>,
    view: TensorView<'a>,
}

impl<'a> Source<'a> {
    // Without a GPU path no view can be elsewhere, and nothing needs a name.
    #[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(unused_variables, clippy::unnecessary_wraps))]
    pub fn new(op: &'static str, tensor: &'static str, view: TensorView<'a>) -> Result<Self> {
        let slice = match view.storage() {
            Storage::F32(s) => Slice::F32(s),
            Storage::F16(s) => Slice::F16(s),
            Storage::Bf16(s) => Slice::Bf16(s),
            #[cfg(feature = "wgpu")]
            Storage::Buffer { .. } => return Err(on_gpu(op, tensor)),
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) => return Err(on_gpu(op, tensor)),
        };
        Ok(Self { slice, view })
    }

    /// Reads `n` tokens from `[sequence, token, head]` on into rows of `row` elements, and zeros the rows left of a
    /// whole block; what pads a row is left alone. Rows `ahead` tokens on are asked for: they are too far apart for
    /// the hardware to foresee.
    pub fn read(&self, level: Level, [b, t, h]: [usize; 3], n: usize, ahead: isize, to: &mut [f32], row: usize) {
        let (at, stride, dim) = (self.view.row_offset(b, t, h), self.view.strides()[1], self.view.shape()[3]);
        let ahead = ahead.wrapping_mul(stride as isize);
        match self.slice {
            Slice::F32(from) => level.run(Widen { from: &from[at..], stride, n, dim, ahead, to, row }),
            Slice::F16(from) => level.run(Widen { from: &from[at..], stride, n, dim, ahead, to, row }),
            Slice::Bf16(from) => level.run(Widen { from: &from[at..], stride, n, dim, ahead, to, row }),
        }
        to[n * row..n.next_multiple_of(ROW) * row].fill(0.0);
    }
}

struct Widen<'a, E> {
    from: &'a [E],
    stride: usize,
    n: usize,
    dim: usize,
    ahead: isize,
    to: &'a mut [f32],
    row: usize,
}

impl<E: Element> Kernel for Widen<'_, E> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let whole = self.dim / S::F32_LANES * S::F32_LANES;
        for i in 0..self.n {
            let from = &self.from[i * self.stride..][..self.dim];
            let to = &mut self.to[i * self.row..][..self.dim];
            for c in (0..self.dim).step_by(64 / size_of::<E>()) {
                prefetch_far(from, (c as isize).wrapping_add(self.ahead) as usize);
            }
            for c in (0..whole).step_by(S::F32_LANES) {
                simd.store(&mut to[c..], E::load(simd, &from[c..]));
            }
            for (to, from) in to[whole..].iter_mut().zip(&from[whole..]) {
                *to = from.to_f32();
            }
        }
    }
}

/// The transpose of `[rows, columns]` as `[columns, rows]`, both whole blocks.
pub(super) struct Transpose<'a> {
    pub rows: usize,
    pub columns: usize,
    pub from: &'a [f32],
    pub to: &'a mut [f32],
}

impl Kernel for Transpose<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) {
        let Self { rows, columns, from, to } = self;
        for r in (0..rows).step_by(ROW) {
            for c in (0..columns).step_by(ROW) {
                simd.transpose(&from[r * columns + c..], columns, &mut to[c * rows + r..], rows);
            }
        }
    }
}

/// A result under way: `[batch, token, head, channel]`, zero until written.
pub(super) struct Room {
    dtype: DType,
    shape: [usize; 4],
    bytes: Vec<u8>,
}

impl Room {
    pub fn new(op: &'static str, dtype: DType, shape: [usize; 4]) -> Result<Self> {
        let bytes = shape.iter().fold(dtype.size(), |product, n| product.saturating_mul(*n));
        Ok(Self { dtype, shape, bytes: zeros(op, bytes)? })
    }

    /// What threads write to.
    pub fn rows(&mut self) -> Rows<'_> {
        let Self { dtype, shape, bytes } = self;
        Rows { dtype: *dtype, shape: *shape, start: bytes.as_mut_ptr(), len: bytes.len(), room: PhantomData }
    }

    pub fn finish(self) -> Tensor {
        Tensor::host(self.dtype, self.shape.to_vec(), self.bytes)
    }
}

/// Rows of a [`Room`], each of which one thread writes.
pub(super) struct Rows<'a> {
    dtype: DType,
    shape: [usize; 4],
    start: *mut u8,
    len: usize,
    room: PhantomData<&'a mut [u8]>,
}

// SAFETY: the pointer is only written through, and by `write` alone, whose callers keep apart what they write.
unsafe impl Send for Rows<'_> {}
// SAFETY: as above.
unsafe impl Sync for Rows<'_> {}

impl Rows<'_> {
    /// Writes `n` tokens from `[sequence, token, head]` on from rows of `row` elements.
    ///
    /// # Safety
    /// No other thread writes these tokens of this sequence and head.
    pub unsafe fn write(&self, level: Level, [b, t, h]: [usize; 3], n: usize, from: &[f32], row: usize) {
        let [_, tokens, heads, dim] = self.shape;
        let size = dim * self.dtype.size();
        let (at, stride) = (((b * tokens + t) * heads + h) * size, heads * size);
        if n == 0 {
            return;
        }
        assert!(at + (n - 1) * stride + size <= self.len && from.len() >= n * row);
        let to = self.start.wrapping_add(at);
        level.run(Narrow { dtype: self.dtype, from, row, dim, n, to, stride });
    }
}

/// Rows rounded to the nearest of `dtype`, ties to even, little endian. `n` rows of `dim` elements can be written, each
/// `stride` bytes after the last.
struct Narrow<'a> {
    dtype: DType,
    from: &'a [f32],
    row: usize,
    dim: usize,
    n: usize,
    to: *mut u8,
    stride: usize,
}

impl Kernel for Narrow<'_> {
    type Output = ();
    #[inline(always)]
    fn run<S: Lanes>(self, _: S) {
        let Self { dtype, row, dim, n, stride, .. } = self;
        for (i, from) in self.from.chunks_exact(row).take(n).enumerate() {
            let from = &from[..dim];
            // SAFETY: `Rows::write` checked that the rows lie inside its room, and no other thread writes them.
            let to = unsafe { std::slice::from_raw_parts_mut(self.to.add(i * stride), dim * dtype.size()) };
            match dtype {
                DType::F16 => {
                    let mut half = [f16::ZERO; 64];
                    for (from, to) in from.chunks(64).zip(to.chunks_mut(128)) {
                        let half = &mut half[..from.len()];
                        half.convert_from_f32_slice(from);
                        for (to, x) in to.chunks_exact_mut(2).zip(half) {
                            to.copy_from_slice(&x.to_le_bytes());
                        }
                    }
                }
                DType::Bf16 => {
                    for (to, x) in to.chunks_exact_mut(2).zip(from) {
                        to.copy_from_slice(&brain(*x).to_le_bytes());
                    }
                }
                _ => {
                    for (to, x) in to.chunks_exact_mut(4).zip(from) {
                        to.copy_from_slice(&x.to_le_bytes());
                    }
                }
            }
        }
    }
}

/// The bits of `x` as bfloat16, without a branch.
#[inline(always)]
fn brain(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    // A NaN must not round to an infinity.
    (if x.is_nan() { bits >> 16 | 0x40 } else { rounded }) as u16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounding_to_bfloat16() {
        let bits = (0..=u16::MAX).flat_map(|high| [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff].map(|low| (high, low)));
        for (high, low) in bits {
            let x = f32::from_bits(u32::from(high) << 16 | low);
            assert_eq!(brain(x), bf16::from_f32(x).to_bits(), "{x}");
        }
    }
}
