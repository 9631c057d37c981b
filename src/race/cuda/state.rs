//! States on a device, in pairs of floats, and sums of parameters' gradients, in doubles.

use super::CudaRace;
use super::kernels::Kernel;
use super::params::Finish;
use crate::engine::cuda::{Bind, Buffer, Context, Grid, Passes};
use crate::error::{Error, Result};
use crate::race::executor::{StateData, StateStorage};
use crate::tensor::{DType, Tensor};
use std::sync::Arc;

/// A and B, or gradients of them: `[batch, kv head, ensemble, part, bucket, value_dim + 1]`, the last column A, all sums'
/// high parts and then all their low ones (see shaders/cuda/race/state.cuh). A step leaves its token in `pending`, which is
/// added when there are some (see shaders/cuda/race/any/pending.cuh): how many wait is known to the device alone, since
/// steps may be replays of a graph.
#[derive(Debug)]
pub(crate) struct CudaState {
    pub buffer: Buffer,
    /// Records, `[batch, kv head]`.
    pub pending: Buffer,
}

impl CudaState {
    pub fn bytes(&self) -> u64 {
        self.buffer.size() + self.pending.size()
    }
}

/// Tokens that may wait: as many hashes as a block has room for.
fn pending(bits: usize) -> usize {
    match bits {
        0..=64 => 16,
        65..=128 => 8,
        129..=256 => 4,
        _ => 1,
    }
}

/// Gradients of β and hyperplanes: `[set, ensemble, bits, head_dim + 1]` in doubles, in the last column what the bit
/// gives to β's. One set per kv head where hyperplanes or β have one each.
#[derive(Debug)]
pub(crate) struct CudaParameterSums {
    pub totals: Buffer,
    pub plane_sets: usize,
    pub betas: usize,
}

impl CudaParameterSums {
    pub fn sets(&self) -> usize {
        self.plane_sets.max(self.betas)
    }
}

fn own(ctx: &Arc<Context>, op: &'static str, tensor: &'static str, buffer: &Buffer) -> Result<()> {
    if Arc::ptr_eq(ctx, buffer.context()) {
        return Ok(());
    }
    Err(Error::WrongDevice { op, tensor, got: "another CUDA device", expected: "this CUDA device" })
}

impl CudaRace {
    /// The state, if it is of this device.
    pub(super) fn own_state<'a>(&self, op: &'static str, state: &'a CudaState) -> Result<&'a CudaState> {
        own(&self.ctx, op, "state", &state.buffer)?;
        Ok(state)
    }

    /// Zeros, in the room for the tokens that wait: where nothing can be stepped there is none.
    fn none_pending(&self, op: &'static str, batch: usize) -> Result<Buffer> {
        let g = &self.geometry;
        let record = 2 + pending(g.bits()) * (g.ensembles * g.bits() + g.value_dim);
        let units = if self.causal { batch.saturating_mul(g.num_kv_heads) } else { 0 };
        self.ctx.buffer(op, (units as u64).saturating_mul(record as u64 * 4).max(4))
    }

    /// Adds the tokens that wait to the sums, which all but a step take.
    pub(super) fn fold(&self, op: &'static str, state: &CudaState) -> Result<()> {
        if !self.causal {
            return Ok(());
        }
        let g = &self.geometry;
        let units = state.buffer.size() / (g.ensembles * g.state_unit() * 8) as u64;
        let mut passes = Passes::new(&self.ctx, op);
        let binds = vec![Bind::from(&state.buffer), Bind::from(&state.pending)];
        passes.dispatch(self.key(Kernel::Fold), (), Grid::new(units, 256), binds)?;
        passes.ready()?.run(&self.ctx, op)
    }

    pub(super) fn zero_state(&self, op: &'static str, batch: usize) -> Result<CudaState> {
        let bytes = (batch as u64).saturating_mul(self.geometry.state_bytes());
        Ok(CudaState { buffer: self.ctx.buffer(op, bytes)?, pending: self.none_pending(op, batch)? })
    }

    pub(super) fn copy_state(&self, op: &'static str, state: &CudaState) -> Result<CudaState> {
        let state = self.own_state(op, state)?;
        let copy = |from: &Buffer| -> Result<Buffer> {
            let to = self.ctx.uninit(op, from.size())?;
            self.ctx.copy(op, (from, 0), (&to, 0), from.size())?;
            Ok(to)
        };
        Ok(CudaState { buffer: copy(&state.buffer)?, pending: copy(&state.pending)? })
    }

    pub(super) fn export_state(&self, op: &'static str, state: &CudaState) -> Result<StateData> {
        let buffer = &self.own_state(op, state)?.buffer;
        self.fold(op, state)?;
        let bytes = self.ctx.read_buffer_blocking(op, buffer, 0, buffer.size())?;
        let (dim, columns) = (self.geometry.value_dim, self.geometry.columns());
        let rows = bytes.len() / 8 / columns;
        let mut data = StateData { a: Vec::with_capacity(rows), b: Vec::with_capacity(rows * dim) };
        let part = |bytes: &[u8]| f64::from(bytemuck::pod_read_unaligned::<f32>(bytes));
        for unit in bytes.chunks_exact(self.geometry.state_unit() * 8) {
            let (high, low) = unit.split_at(unit.len() / 2);
            let rows = high.chunks_exact(columns * 4).zip(low.chunks_exact(columns * 4));
            for (high, low) in rows {
                data.b.extend(high.chunks_exact(4).zip(low.chunks_exact(4)).map(|(high, low)| part(high) + part(low)));
                data.a.extend(data.b.pop());
            }
        }
        Ok(data)
    }

    pub(super) fn import_state(&self, op: &'static str, data: &StateData) -> Result<StateStorage> {
        let g = &self.geometry;
        let mut parts: Vec<f32> = Vec::with_capacity(2 * (data.a.len() + data.b.len()));
        let units = data.a.chunks_exact(g.buckets()).zip(data.b.chunks_exact(g.buckets() * g.value_dim));
        for (a, b) in units {
            let sums = || a.iter().zip(b.chunks_exact(g.value_dim)).flat_map(|(a, row)| row.iter().chain([a]));
            parts.extend(sums().map(|&sum| sum as f32));
            parts.extend(sums().map(|&sum| (sum - f64::from(sum as f32)) as f32));
        }
        let buffer = self.ctx.buffer_with(op, bytemuck::cast_slice(&parts))?;
        let batch = data.a.len() / (g.num_kv_heads * g.ensembles * g.buckets()).max(1);
        Ok(StateStorage::Cuda(CudaState { buffer, pending: self.none_pending(op, batch)? }))
    }

    pub(super) fn zero_sums(&self, op: &'static str) -> Result<CudaParameterSums> {
        let g = &self.geometry;
        let plane_sets = if self.planes_stride == 0 { 1 } else { g.num_kv_heads };
        let bytes = plane_sets.max(self.betas) * g.ensembles * g.bits() * (g.head_dim + 1) * 8;
        Ok(CudaParameterSums { totals: self.ctx.buffer(op, bytes as u64)?, plane_sets, betas: self.betas })
    }

    pub(super) fn own_sums(&self, op: &'static str, sums: &CudaParameterSums) -> Result<()> {
        own(&self.ctx, op, "parameter sums", &sums.totals)
    }

    /// Gradients of β and of the hyperplanes.
    pub(super) fn total(&self, op: &'static str, sums: &CudaParameterSums) -> Result<(Tensor, Tensor)> {
        let g = &self.geometry;
        self.own_sums(op, sums)?;
        let shape = vec![sums.plane_sets, g.ensembles * g.bits(), g.head_dim];
        let elements = shape.iter().product::<usize>();
        let planes = self.ctx.uninit(op, (elements * 4) as u64)?;
        let betas = self.ctx.uninit(op, (sums.betas * 4) as u64)?;
        let mut passes = Passes::new(&self.ctx, op);
        let params = Finish {
            sets: sums.sets() as u32,
            plane_sets: sums.plane_sets as u32,
            betas: sums.betas as u32,
            reserved: 0,
        };
        let grid = Grid::new((elements + sums.betas).div_ceil(256) as u64, 256);
        let binds = vec![Bind::from(&sums.totals), Bind::from(&planes), Bind::from(&betas)];
        passes.dispatch(self.key(Kernel::FinishParameters), params, grid, binds)?;
        passes.ready()?.run(&self.ctx, op)?;
        Ok((Tensor::cuda(DType::F32, vec![sums.betas], betas), Tensor::cuda(DType::F32, shape, planes)))
    }
}
