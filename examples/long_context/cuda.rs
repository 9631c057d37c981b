//! What the example asks of CUDA itself.

use crate::race_truth::At;
use softhash::cudarc::driver::result;
use softhash::{DType, Device, StreamFailure, Tensor};
use std::ops::Range;

/// As [`crate::race_truth::note`], reading only the rows asked for; whether the tensor is in CUDA memory.
pub fn note(
    device: &Device,
    found: &mut [At],
    head: usize,
    range: &Range<u64>,
    tensor: &Tensor,
    of: impl Fn(&mut At) -> &mut Vec<f64>,
) -> Result<bool, StreamFailure> {
    let (Some((context, _)), Some(pointer)) = (device.as_cuda(), tensor.as_cuda()) else { return Ok(false) };
    let [heads, channels] = [tensor.shape()[2], tensor.shape()[3]];
    let size = tensor.dtype().size();
    context.bind_to_thread()?;
    for at in found.iter_mut().filter(|at| range.contains(&at.token)) {
        let row = (at.token - range.start) as usize * heads + head;
        let mut bytes = vec![0u8; channels * size];
        // SAFETY: a row of the tensor, whose work is done when a stream hands it out.
        unsafe { result::memcpy_dtoh_sync(&mut bytes, pointer + (row * channels * size) as u64) }?;
        let number = |bytes: &[u8]| match (tensor.dtype(), bytes) {
            (DType::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            (DType::F16, &[a, b]) => half::f16::from_le_bytes([a, b]).to_f32(),
            (DType::Bf16, &[a, b]) => half::bf16::from_le_bytes([a, b]).to_f32(),
            _ => f32::NAN,
        };
        *of(at) = bytes.chunks_exact(size).map(|bytes| f64::from(number(bytes))).collect();
    }
    Ok(true)
}

/// Bytes of the device's memory that are taken, by whomever.
pub fn memory_taken(device: &Device) -> Option<u64> {
    let (context, _) = device.as_cuda()?;
    let (free, all) = context.mem_get_info().ok()?;
    Some((all - free) as u64)
}
