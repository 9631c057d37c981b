//! Tensors in the memory of a device, and single elements of them.

use super::outcome::Outcome;
use half::bf16;
use softhash::{DType, Device, Tensor, wgpu};
use std::ops::Range;

/// The tensor in the device's memory, `times` times one after the other along its tokens.
pub fn repeated(device: &Device, tensor: Tensor, times: usize) -> Outcome<Tensor> {
    let host = tensor.read_blocking()?;
    let mut shape: [usize; 4] = tensor.shape().try_into()?;
    shape[1] *= times;
    #[cfg(feature = "cuda")]
    if let Some((_, stream)) = device.as_cuda() {
        let (piece, bytes) = (host.bytes().len(), host.bytes().len() * times);
        // SAFETY: every byte is written below.
        let mut slice = unsafe { stream.alloc::<u8>(bytes)? };
        let first = stream.clone_htod(host.bytes())?;
        for at in (0..bytes).step_by(piece) {
            stream.memcpy_dtod(&first, &mut slice.slice_mut(at..at + piece))?;
        }
        return Ok(Tensor::from_cuda_slice(device, slice, tensor.dtype(), shape)?);
    }
    let bytes = host.bytes().repeat(times);
    if let Some((gpu, queue)) = device.as_wgpu() {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let size = (bytes.len() as u64).next_multiple_of(4);
        let buffer = gpu.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
        queue.write_buffer(&buffer, 0, &bytes);
        return Ok(Tensor::from_buffer(device, buffer, tensor.dtype(), shape)?);
    }
    Ok(match tensor.dtype() {
        DType::Bf16 => Tensor::from_bf16(bytemuck::pod_collect_to_vec(&bytes), shape)?,
        _ => Tensor::from_f32(bytemuck::pod_collect_to_vec(&bytes), shape)?,
    })
}

/// The tensor in the device's memory.
pub fn resident(device: &Device, tensor: Tensor) -> Outcome<Tensor> {
    if device.is_cpu() { Ok(tensor) } else { repeated(device, tensor, 1) }
}

/// Elements of a tensor of `device`'s, without reading the others.
pub fn elements(device: &Device, tensor: &Tensor, range: Range<usize>) -> Outcome<Vec<f32>> {
    let size = tensor.dtype().size();
    let bytes = range.start * size..range.end * size;
    let raw = match read_bytes(device, tensor, bytes.clone())? {
        Some(raw) => raw,
        None => tensor.read_blocking()?.bytes()[bytes].to_vec(),
    };
    Ok(match tensor.dtype() {
        DType::Bf16 => raw.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
        _ => raw.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
    })
}

/// `None` where the tensor is on the host.
fn read_bytes(device: &Device, tensor: &Tensor, bytes: Range<usize>) -> Outcome<Option<Vec<u8>>> {
    #[cfg(feature = "cuda")]
    if let (Some((_, stream)), Some(pointer)) = (device.as_cuda(), tensor.as_cuda()) {
        // SAFETY: the tensor's own memory on the device's stream, given back by `leak` before the tensor can go.
        let slice = unsafe { stream.upgrade_device_ptr::<u8>(pointer, bytes.end) };
        let raw = stream.clone_dtoh(&slice.slice(bytes));
        slice.leak();
        return Ok(Some(raw?));
    }
    let (Some((gpu, queue)), Some(buffer)) = (device.as_wgpu(), tensor.as_buffer()) else { return Ok(None) };
    let (size, usage) = (bytes.len() as u64, wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ);
    let staging = gpu.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false });
    let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(buffer, bytes.start as u64, &staging, 0, size);
    queue.submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |_| ());
    gpu.poll(wgpu::PollType::wait_indefinitely())?;
    let raw = staging.get_mapped_range(..)?.to_vec();
    Ok(Some(raw))
}
