//! States on a device.

use super::{GpuRace, STORAGE};
use crate::engine::gpu::{Bind, Context};
use crate::error::{Error, Result};
use crate::race::executor::{StateData, StateStorage};
use std::ops::Range;
use std::sync::Arc;

/// A and B, or gradients of them, on a GPU: `[batch, kv head, ensemble, bucket, value_dim + 1]`, the last column A, as
/// pairs of f32 (high, low).
#[derive(Debug)]
pub(crate) struct GpuState {
    pub ctx: Arc<Context>,
    pub buffer: wgpu::Buffer,
    pub batch: usize,
}

impl GpuState {
    pub fn bytes(&self) -> u64 {
        self.buffer.size()
    }
}

impl GpuRace {
    fn state_buffer(&self, op: &'static str, batch: usize) -> Result<wgpu::Buffer> {
        let bytes = (batch as u64).saturating_mul(self.geometry.state_bytes());
        self.ctx.buffer(op, "RACE state", bytes, STORAGE)
    }

    /// A state of zeros.
    pub(super) fn zero_state(&self, op: &'static str, batch: usize) -> Result<GpuState> {
        let buffer = self.state_buffer(op, batch)?;
        Ok(GpuState { ctx: self.ctx.clone(), buffer, batch })
    }

    /// The state, if it is of this device.
    pub(super) fn own<'a>(&self, op: &'static str, state: &'a GpuState) -> Result<&'a GpuState> {
        if Arc::ptr_eq(&self.ctx, &state.ctx) {
            return Ok(state);
        }
        Err(Error::WrongDevice { op, tensor: "state", got: "another GPU device", expected: "this GPU device" })
    }

    /// A copy of its own.
    pub(super) fn copy_state(&self, op: &'static str, state: &GpuState) -> Result<GpuState> {
        let buffer = self.state_buffer(op, self.own(op, state)?.batch)?;
        self.ctx.copy_whole(op, &state.buffer, &buffer)?;
        Ok(GpuState { ctx: self.ctx.clone(), buffer, batch: state.batch })
    }

    /// The states of some sequences as a binding, and the element of it that their first unit begins at.
    pub(super) fn bind_state(&self, state: &GpuState, sequences: &Range<usize>) -> (Bind, u32) {
        let one = self.geometry.state_bytes();
        Bind::range(&self.ctx, &state.buffer, sequences.start as u64 * one..sequences.end as u64 * one, 8)
    }

    #[cfg(target_arch = "wasm32")]
    pub(super) fn export_state(&self, op: &'static str, _: &GpuState) -> Result<StateData> {
        Err(Error::Unsupported { op, why: "browsers cannot wait for the GPU".into() })
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn export_state(&self, op: &'static str, state: &GpuState) -> Result<StateData> {
        let bytes = self.own(op, state)?.batch as u64 * self.geometry.state_bytes();
        let bytes = self.ctx.read_buffer_blocking(op, &state.buffer, 0, bytes)?;
        let half = |b: &[u8]| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
        let (dim, columns) = (self.geometry.value_dim, self.geometry.columns());
        let rows = bytes.len() / 8 / columns;
        let mut data = StateData { a: Vec::with_capacity(rows), b: Vec::with_capacity(rows * dim) };
        for row in bytes.chunks_exact(columns * 8) {
            let values = row.chunks_exact(8).map(|pair| half(pair) + half(&pair[4..]));
            data.b.extend(values);
            data.a.extend(data.b.pop());
        }
        Ok(data)
    }

    pub(super) fn import_state(&self, op: &'static str, data: &StateData) -> Result<StateStorage> {
        let (dim, one) = (self.geometry.value_dim, self.geometry.units() * self.geometry.buckets());
        let mut pairs: Vec<f32> = Vec::with_capacity(data.a.len() * self.geometry.columns() * 2);
        for (a, row) in data.a.iter().zip(data.b.chunks_exact(dim)) {
            for value in row.iter().chain([a]) {
                let high = *value as f32;
                pairs.extend([high, (value - f64::from(high)) as f32]);
            }
        }
        let buffer = self.ctx.buffer_with(op, "RACE state", bytemuck::cast_slice(&pairs), STORAGE)?;
        Ok(StateStorage::Gpu(GpuState { ctx: self.ctx.clone(), buffer, batch: data.a.len() / one }))
    }
}
