//! Inputs on their way into kernels: host slices are packed and uploaded, CUDA memory is read in place.

use super::context::Context;
use super::passes::Bind;
use crate::error::{Error, Result};
use crate::tensor::{Storage, TensorView};
use bytemuck::{Pod, Zeroable};
use std::ops::Range;
use std::sync::Arc;

/// Strides of an input in elements; its address is that of its first element.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Pod, Zeroable)]
pub(crate) struct Strides {
    pub batch: u64,
    pub token: u64,
    pub head: u64,
}

impl Strides {
    /// In 32 bits, as the parameter structs that both GPU paths share have them.
    ///
    /// # Errors
    /// [`Error::Limit`] for strides that do not fit.
    #[cfg_attr(not(test), allow(dead_code, reason = "no kernel here wants it yet"))]
    pub fn narrow(self, op: &'static str) -> Result<crate::engine::Strides> {
        let limit = u64::from(u32::MAX);
        let fit = |value: u64| u32::try_from(value).map_err(|_| Error::Limit { op, what: "stride", value, limit });
        Ok(crate::engine::Strides {
            offset: 0,
            batch: fit(self.batch)?,
            token: fit(self.token)?,
            head: fit(self.head)?,
        })
    }
}

/// An input as kernels see it.
#[derive(Clone, Debug)]
pub(crate) struct Input {
    pub bind: Bind,
    pub strides: Strides,
    /// Largest power of two, up to 16, that the address of each row is a multiple of.
    pub alignment: u64,
}

/// Makes rows `batch` and tokens `tokens` of `view` readable by kernels, numbered from 0.
///
/// # Errors
/// [`Error::WrongDevice`] for memory of another device or another API; [`Error::OutOfMemory`];
/// [`Error::Unsupported`] for host memory while a graph is captured.
pub(crate) fn stage(
    ctx: &Arc<Context>,
    op: &'static str,
    tensor: &'static str,
    view: &TensorView<'_>,
    batch: Range<usize>,
    tokens: Range<usize>,
) -> Result<Input> {
    let size = view.dtype().size() as u64;
    let wrong = |got| Error::WrongDevice { op, tensor, got, expected: "this CUDA device" };
    match view.storage() {
        Storage::Cuda(memory) => {
            if !ctx.is_same(memory.context()) {
                return Err(wrong("another CUDA device"));
            }
            if memory.stream().is_some_and(|stream| stream != ctx.cu_stream()) {
                let why = "memory of another stream than the device's; make the streams wait for each other and pass \
                           the pointer (TensorView::cuda_pointer)";
                return Err(Error::Unsupported { op, why: format!("{tensor} is {why}") });
            }
            let start = memory.pointer() + view.row_offset(batch.start, tokens.start, 0) as u64 * size;
            let bind = match memory.buffer() {
                Some(buffer) => Bind::at(buffer, start - buffer.pointer()),
                None => Bind::lent(start),
            };
            let [b, t, h, _] = view.strides().map(|stride| stride as u64);
            let strides = Strides { batch: b, token: t, head: h };
            let gaps = [(b, batch.len()), (t, tokens.len()), (h, view.shape()[2])];
            let alignment = gaps
                .iter()
                .filter(|(_, count)| *count > 1)
                .fold(bind.alignment(), |least, (stride, _)| least.min(1 << ((stride * size) | 16).trailing_zeros()));
            Ok(Input { bind, strides, alignment })
        }
        #[cfg(feature = "wgpu")]
        Storage::Buffer { .. } => Err(wrong("a wgpu buffer")),
        Storage::F32(_) | Storage::F16(_) | Storage::Bf16(_) => {
            let [_, _, heads, channels] = view.shape();
            let (rows, count) = (batch.len(), tokens.len());
            let data = view.host_bytes(batch, tokens).ok_or_else(|| wrong("elsewhere"))?;
            let buffer = ctx.buffer_with(op, &data)?;
            let token = (heads * channels) as u64;
            let strides = Strides { batch: count as u64 * token, token, head: channels as u64 };
            let gap = if rows * count * heads > 1 { channels as u64 * size } else { 0 };
            Ok(Input { bind: Bind::from(&buffer), strides, alignment: 1 << (gap | 16).trailing_zeros() })
        }
    }
}
