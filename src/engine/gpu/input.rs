//! Inputs on their way into kernels: host slices are packed and uploaded, buffers are bound in place.

use super::context::Context;
use super::passes::Bind;
use crate::engine::Strides;
use crate::error::{Error, Result};
use crate::tensor::{Storage, TensorView};
use std::ops::Range;

/// An input as kernels see it.
pub(crate) struct Input {
    pub bind: Bind,
    pub strides: Strides,
}

/// Bytes that [`stage`] would bind for the given rows and tokens.
pub(crate) fn staged_bytes(view: &TensorView<'_>, batch: usize, tokens: usize) -> u64 {
    let [_, _, h, d] = view.shape();
    match view.storage() {
        Storage::F32(_) | Storage::F16(_) | Storage::Bf16(_) => (batch * tokens * h * d * view.dtype().size()) as u64,
        #[cfg(feature = "cuda")]
        Storage::Cuda(_) => 0,
        Storage::Buffer { .. } => {
            let reach = TensorView::extent(&sub_view(view, 0..batch, 0..tokens));
            reach * view.dtype().size() as u64 + 512
        }
    }
}

fn sub_view<'a>(view: &TensorView<'a>, batch: Range<usize>, tokens: Range<usize>) -> TensorView<'a> {
    let [_, _, h, d] = view.shape();
    view.with_shape([batch.len(), tokens.len(), h, d])
}

/// Makes rows `batch` and tokens `tokens` of `view` readable by kernels, numbered from 0.
pub(crate) fn stage(
    ctx: &Context,
    op: &'static str,
    view: &TensorView<'_>,
    batch: Range<usize>,
    tokens: Range<usize>,
) -> Result<Input> {
    let [_, _, heads, channels] = view.shape();
    let limit = ctx.caps().max_storage_binding;
    let size = view.dtype().size();
    let too_large = |value| Error::Limit { op, what: "bytes of one input binding", value, limit };
    #[cfg(feature = "cuda")]
    if let Storage::Cuda(_) = view.storage() {
        let (got, expected) = ("CUDA memory", "this wgpu device");
        return Err(Error::WrongDevice { op, tensor: "input", got, expected });
    }
    if let Storage::Buffer { buffer, offset } = view.storage() {
        if !buffer.usage().contains(wgpu::BufferUsages::STORAGE) {
            return Err(Error::Unsupported { op, why: "input buffers must have STORAGE usage".into() });
        }
        let extent = sub_view(view, batch.clone(), tokens.clone()).extent();
        let start = offset + (view.row_offset(batch.start, tokens.start, 0) * size) as u64;
        let align = u64::from(ctx.caps().storage_align).max(4);
        let at = start / align * align;
        let bytes = (start - at + extent * size as u64).next_multiple_of(4).max(4);
        if at + bytes > buffer.size() {
            return Err(Error::Unsupported {
                op,
                why: "input buffers must have a size that is a multiple of 4".into(),
            });
        }
        if bytes > limit || extent > u64::from(u32::MAX) / 2 {
            return Err(too_large(bytes));
        }
        let [b, t, h, _] = view.strides().map(|s| u32::try_from(s).unwrap_or(u32::MAX));
        let strides = Strides { offset: ((start - at) / size as u64) as u32, batch: b, token: t, head: h };
        return Ok(Input { bind: Bind::Range { buffer: buffer.clone(), offset: at, size: bytes }, strides });
    }
    let bytes = staged_bytes(view, batch.len(), tokens.len());
    if bytes > limit {
        return Err(too_large(bytes));
    }
    let data = view.host_bytes(batch, tokens.clone()).ok_or_else(|| too_large(bytes))?;
    let buffer = ctx.buffer_with(op, "input", &data, wgpu::BufferUsages::STORAGE)?;
    let token = heads * channels;
    let strides =
        Strides { offset: 0, batch: (tokens.len() * token) as u32, token: token as u32, head: channels as u32 };
    Ok(Input { bind: Bind::from(&buffer), strides })
}
