//! The wgpu executor: calls are cut into pieces, and each piece is a short list of dispatches.
//!
//! A piece ([`crate::race::plan::Piece`]) is some tokens of some sequences; it is worked on ensemble by ensemble and
//! block by block of kv heads ([`sweep::Block`]), in scratch buffers that all blocks share:
//!
//! | buffer | layout |
//! |---|---|
//! | hashes | t = tanh(w·x): of keys `[sequence, token, kv head of the block, L·P]`, then of queries with all heads of the group |
//! | matrices | `[unit, run, S + 1, Dv + 1]`, rows padded to whole fours: \[α, 1\]ᵀ\[v, 1\] of each run of 4 chunks of 64 tokens, then in its place the sum before the run; after them `[unit, chunk, S + 1, Dv + 1]`: of a run's chunks but the first, the sum of the run's chunks before it |
//! | segments | `[unit, segment, S + 1, Dv + 1]`, likewise, pairs of f32: sums of 16 runs, then the sums before them |
//! | state | `[sequence, kv head, ensemble, S, Dv + 1]` pairs of f32: B, and A in the last column |
//!
//! α = R·φ − c with the centring constant c of the kv head, see [`crate::race::plan::centre`]. A matrix's last row and
//! column are the sums of v and of ones, so that plain A and B follow from it whatever c is.

mod backward;
mod backward_kernels;
mod forward;
mod kernels;
mod params;
mod state;
mod sweep;
mod window;
mod window_kernels;

#[cfg(test)]
mod backward_tests;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod window_tests;

pub(crate) use backward::GpuParameterSums;
pub(crate) use state::GpuState;
pub(crate) use window::{GpuRing, GpuWindow};

use crate::engine::gpu::{Context, KernelKey, Scratch};
use crate::engine::{Recording, WarmUp};
use crate::error::{Error, Result};
use crate::race::config::{Normalization, Parameters, RaceConfig, RaceShape};
use crate::race::executor::{Call, InputGradients, Inputs, ParameterSums, RaceExecutor, StateData, StateStorage};
use crate::race::gpu::kernels::{Kernel, Key};
use crate::race::plan::{Budget, Geometry, centre, pieces};
use crate::tensor::{DType, Tensor};
use std::sync::Arc;

const STORAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

/// Scratch buffers that calls share.
#[derive(Default)]
struct Workspace {
    /// t of keys and queries.
    hashes: Scratch,
    /// Matrices of runs and chunks.
    matrices: Scratch,
    /// Sums of segments of runs.
    segments: Scratch,
    /// Outputs summed over ensembles.
    sums: Scratch,
    /// Of a backward: gradients of hashes, readings of queries, shares of the parameters' gradients.
    hash_gradients: Scratch,
    readings: Scratch,
    shares: Scratch,
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
    /// Values of β: one, or one per kv head.
    betas: usize,
    causal: bool,
    /// Factor of a bucket normalisation's sum, of one ensemble.
    weight: f32,
    workspace: Workspace,
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
        let (heads, betas) = (heads(&geometry, parameters), parameters.beta.values().len());
        let (causal, workspace) = (config.causal, Workspace::default());
        Ok(Self { ctx, geometry, budget, planes, planes_stride, heads, betas, causal, weight, workspace })
    }

    /// The kernel of outputs, where rows of the input and of the output begin at multiples of four elements, or not.
    fn output_kernel(&self, output: DType, read: bool, in_fours: bool, out_in_fours: bool) -> Kernel {
        let g = &self.geometry;
        if !g.ratio || g.ensembles > 1 {
            return Kernel::Output { output, read };
        }
        let fours = g.value_dim.is_multiple_of(4);
        Kernel::OutputRatio { output, read, wide: in_fours && fours, wide_out: out_in_fours && fours }
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
        self.betas = parameters.beta.values().len();
        Ok(())
    }

    fn new_state(&self, op: &'static str, batch: usize) -> Result<StateStorage> {
        Ok(StateStorage::Gpu(self.zero_state(op, batch)?))
    }

    fn fork(&self, op: &'static str, state: &StateStorage) -> Result<StateStorage> {
        Ok(StateStorage::Gpu(self.copy_state(op, state.gpu(op)?)?))
    }

    fn new_sums(&self, op: &'static str) -> Result<ParameterSums> {
        Ok(ParameterSums::Gpu(self.zero_sums(op)?))
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
        inputs: &Inputs<'_>,
        state: &StateStorage,
        grad_state: &mut StateStorage,
        sums: &mut ParameterSums,
    ) -> Result<InputGradients> {
        let op = call.op;
        self.run_backward(call, inputs, state.gpu(op)?, grad_state.gpu_mut(op)?, sums.gpu_mut(op)?)
    }

    fn finish_sums(&self, op: &'static str, sums: ParameterSums) -> Result<(Tensor, Tensor)> {
        self.total(op, sums.gpu(op)?)
    }

    fn export(&self, op: &'static str, state: &StateStorage) -> Result<StateData> {
        self.export_state(op, state.gpu(op)?)
    }

    fn import(&self, op: &'static str, data: &StateData) -> Result<StateStorage> {
        self.import_state(op, data)
    }

    fn warm_up(&self, output: DType) -> WarmUp {
        let mut kernels = vec![
            Kernel::Project { per_head: 1, wide: self.geometry.head_dim.is_multiple_of(4) },
            Kernel::Project { per_head: self.geometry.group, wide: self.geometry.head_dim.is_multiple_of(4) },
            Kernel::ChunkSums { wide: self.geometry.value_dim.is_multiple_of(4) },
            Kernel::ScanParts { reverse: false },
            Kernel::Scan { reverse: false },
            Kernel::ScanSpread { reverse: false },
            self.output_kernel(output, !self.causal, true, true),
        ];
        if self.causal {
            kernels.extend([Kernel::Step { output }, Kernel::StepMass]);
        }
        let boxed = |kernel| Box::new(self.key(kernel)) as Box<dyn KernelKey>;
        WarmUp::new(self.ctx.clone(), kernels.into_iter().map(boxed).collect())
    }
}
