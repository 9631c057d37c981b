//! The wgpu executor: calls are cut into pieces, and each piece is a short list of dispatches.
//!
//! A piece ([`crate::race::plan::Piece`]) is some tokens of some sequences; it is worked on ensemble by ensemble and
//! block by block of kv heads ([`sweep::Block`]), in scratch buffers that all blocks share:
//!
//! | buffer | layout |
//! |---|---|
//! | hashes | t = tanh(w·x): of keys `[sequence, token, kv head of the block, L·P]`, then of queries with all heads of the group |
//! | matrices | `[unit, chunk, S + 1, Dv + 1]`: \[α, 1\]ᵀ\[v, 1\] of each chunk of 64 tokens, then in its place the sum before the chunk |
//! | state | `[sequence, kv head, ensemble, S, Dv + 1]` pairs of f32: B, and A in the last column |
//!
//! α = R·φ − c with the centring constant c of the kv head, see [`crate::race::plan::centre`]. A matrix's last row and
//! column are the sums of v and of ones, so that plain A and B follow from it whatever c is.

mod forward;
mod kernels;
mod params;
mod state;
mod sweep;

#[cfg(test)]
mod tests;

pub(crate) use state::GpuState;

use crate::engine::Recording;
use crate::engine::gpu::{Context, Scratch};
use crate::error::{Error, Result};
use crate::race::config::{Normalization, Parameters, RaceConfig, RaceShape};
use crate::race::executor::{Call, InputGradients, Inputs, ParameterSums, RaceExecutor, StateData, StateStorage};
use crate::race::gpu::kernels::{Kernel, Key};
use crate::race::plan::{Budget, Geometry, centre, pieces};
use crate::tensor::Tensor;
use std::sync::Arc;

const STORAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

/// Gradients of β and hyperplanes on a GPU.
#[derive(Debug)]
pub(crate) struct GpuParameterSums {}

/// Scratch buffers that calls share.
#[derive(Default)]
struct Workspace {
    /// t of keys and queries.
    hashes: Scratch,
    /// Matrices of chunks.
    matrices: Scratch,
    /// Outputs summed over ensembles.
    sums: Scratch,
}

/// The wgpu executor.
pub(crate) struct GpuRace {
    ctx: Arc<Context>,
    geometry: Geometry,
    budget: Budget,
    /// Hyperplanes, `[sets, ensembles * tables * planes, head_dim]`.
    planes: wgpu::Buffer,
    /// Elements from one head's hyperplanes to the next's; 0 where they share one set.
    planes_stride: u32,
    /// β and the centring constant of each kv head.
    heads: Vec<[f32; 2]>,
    /// Factor of a bucket normalisation's sum, of one ensemble.
    weight: f32,
    workspace: Workspace,
}

fn missing(op: &'static str) -> Error {
    Error::Unsupported { op, why: "RACE's backward on a GPU".into() }
}

impl GpuRace {
    pub fn new(ctx: Arc<Context>, config: &RaceConfig, shape: &RaceShape, parameters: &Parameters) -> Result<Self> {
        let op = "new";
        ctx.check_alive(op)?;
        let geometry = Geometry::new(config, shape);
        let limit = ctx.caps().max_storage_binding;
        let budget = Budget::new(limit);
        // Any call's smallest piece is that of one token.
        pieces(&geometry, &budget, 1, 1).map_err(|value| too_large(op, value, limit))?;
        let buckets = geometry.buckets() as f32;
        let weight = match config.normalization {
            Normalization::Ratio => 1.0,
            Normalization::BucketMean => 1.0 / buckets,
            Normalization::BucketSum => config.tables as f32 / buckets,
        };
        let (planes, planes_stride) = upload(&ctx, op, parameters)?;
        let heads = heads(&geometry, parameters);
        Ok(Self { ctx, geometry, budget, planes, planes_stride, heads, weight, workspace: Workspace::default() })
    }

    fn key(&self, kernel: Kernel) -> Key {
        Key { kernel, geometry: self.geometry }
    }
}

fn too_large(op: &'static str, value: u64, limit: u64) -> Error {
    Error::Limit { op, what: "bytes of the largest binding that one sequence needs", value, limit }
}

fn upload(ctx: &Context, op: &'static str, parameters: &Parameters) -> Result<(wgpu::Buffer, u32)> {
    let planes = &parameters.planes;
    let bytes = (planes.rows.len() * 4) as u64;
    let limit = ctx.caps().max_storage_binding;
    if bytes > limit {
        return Err(Error::Limit { op, what: "bytes of hyperplanes", value: bytes, limit });
    }
    let buffer = ctx.buffer_with(op, "hyperplanes", bytemuck::cast_slice(&planes.rows), STORAGE)?;
    let stride = if planes.sets == 1 { 0 } else { (planes.bits * planes.head_dim) as u32 };
    Ok((buffer, stride))
}

fn heads(geometry: &Geometry, parameters: &Parameters) -> Vec<[f32; 2]> {
    let betas = (0..geometry.num_kv_heads).map(|head| parameters.beta.of_head(head));
    betas.map(|beta| [beta, centre(beta, geometry.planes)]).collect()
}

impl RaceExecutor for GpuRace {
    /// Into a buffer of their own: commands that a caller recorded and has not submitted keep the old ones.
    fn set_parameters(&mut self, parameters: &Parameters) -> Result<()> {
        (self.planes, self.planes_stride) = upload(&self.ctx, "set_parameters", parameters)?;
        self.heads = heads(&self.geometry, parameters);
        Ok(())
    }

    fn new_state(&self, op: &'static str, batch: usize) -> Result<StateStorage> {
        Ok(StateStorage::Gpu(self.zero_state(op, batch)?))
    }

    fn fork(&self, op: &'static str, state: &StateStorage) -> Result<StateStorage> {
        Ok(StateStorage::Gpu(self.copy_state(op, state.gpu(op)?)?))
    }

    fn new_sums(&self, op: &'static str) -> Result<ParameterSums> {
        Err(missing(op))
    }

    fn forward(
        &mut self,
        rec: Recording<'_>,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &mut StateStorage,
    ) -> Result<Option<Tensor>> {
        self.run_forward(rec, call, inputs, state.gpu_mut(call.op)?)
    }

    fn backward(
        &mut self,
        call: &Call,
        _: &Inputs<'_>,
        _: &StateStorage,
        _: &mut StateStorage,
        _: &mut ParameterSums,
    ) -> Result<InputGradients> {
        Err(missing(call.op))
    }

    fn finish_sums(&self, op: &'static str, _: ParameterSums) -> Result<(Tensor, Tensor)> {
        Err(missing(op))
    }

    fn export(&self, op: &'static str, state: &StateStorage) -> Result<StateData> {
        self.export_state(op, state.gpu(op)?)
    }

    fn import(&self, op: &'static str, data: &StateData) -> Result<StateStorage> {
        self.import_state(op, data)
    }
}
