//! Host tensors to f32 and back.

use super::{DType, Storage, TensorView};
use crate::engine::cpu::memory::zeros;
use crate::error::{Error, Result};
use half::{bf16, f16};

/// What is said of a device buffer where host memory is needed.
pub(crate) fn on_gpu(op: &'static str, tensor: &'static str) -> Error {
    Error::WrongDevice { op, tensor, got: "a GPU buffer", expected: "the CPU" }
}

/// A host tensor as f32, row-major, each row of channels padded with zeros to `stride`.
// Without a GPU path no view can be elsewhere, and `tensor` has nothing to name.
#[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(unused_variables))]
pub(crate) fn padded_rows(
    op: &'static str,
    tensor: &'static str,
    view: &TensorView<'_>,
    stride: usize,
) -> Result<Vec<f32>> {
    let [batch, tokens, heads, dim] = view.shape();
    let mut out = zeros::<f32>(op, batch * tokens * heads * stride)?;
    if out.is_empty() {
        return Ok(out);
    }
    for (i, row) in out.chunks_exact_mut(stride).enumerate() {
        let at = view.row_offset(i / heads / tokens, i / heads % tokens, i % heads);
        match view.storage() {
            Storage::F32(s) => row[..dim].copy_from_slice(&s[at..at + dim]),
            Storage::F16(s) => row.iter_mut().zip(&s[at..at + dim]).for_each(|(o, x)| *o = x.to_f32()),
            Storage::Bf16(s) => row.iter_mut().zip(&s[at..at + dim]).for_each(|(o, x)| *o = x.to_f32()),
            #[cfg(feature = "wgpu")]
            Storage::Buffer { .. } => return Err(on_gpu(op, tensor)),
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) => return Err(on_gpu(op, tensor)),
        }
    }
    Ok(out)
}

/// A host tensor as f32, row-major.
pub(crate) fn host_values(op: &'static str, tensor: &'static str, view: &TensorView<'_>) -> Result<Vec<f32>> {
    padded_rows(op, tensor, view, view.shape()[3])
}

/// f32 values rounded to the nearest of `dtype` (ties to even), little endian.
pub(crate) fn encode(dtype: DType, values: &[f32]) -> Vec<u8> {
    match dtype {
        DType::F32 => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F16 => values.iter().flat_map(|x| f16::from_f32(*x).to_le_bytes()).collect(),
        DType::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        DType::I32 => values.iter().flat_map(|x| (*x as i32).to_le_bytes()).collect(),
    }
}
