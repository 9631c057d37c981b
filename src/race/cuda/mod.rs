//! The CUDA executor.
//!
//! | file | what it holds |
//! |---|---|
//! | `walk` | passes on the tensor cores, for the shapes and types that they take |
//! | `any`, `any_backward` | passes for every other |
//! | `step` | one token of each sequence |
//! | `state` | states, in pairs of floats, and sums in doubles |
//! | `window`, `window_kernels` | the exact window beside it |
//! | `kernels`, `params`, `shared` | the kernels, and what they are given |

mod any;
mod any_backward;
mod kernels;
mod params;
mod shared;
mod state;
mod step;
mod walk;
mod window;
mod window_kernels;

#[cfg(test)]
mod tests;

pub(crate) use state::{CudaParameterSums, CudaState};
#[cfg(test)]
pub(crate) use tests::test_keys;
pub(crate) use window::{CudaRing, CudaWindow};

use crate::engine::cuda::{Buffer, Context, KernelKey, Scratch};
use crate::engine::{Recording, WarmUp};
use crate::error::{Error, Result};
use crate::race::config::{Normalization, Parameters, RaceConfig, RaceShape};
use crate::race::executor::{Call, InputGradients, Inputs, ParameterSums, Pass, RaceExecutor, StateData, StateStorage};
use crate::race::plan::{Geometry, centre};
use crate::tensor::{DType, Tensor};
use kernels::{Kernel, Key};
use std::sync::Arc;

/// Scratch memory that calls share.
#[derive(Default)]
struct Workspace {
    /// Sums of spans or chunks; what queries give to their gradients.
    matrices: Scratch,
    of_queries: Scratch,
    readings: Scratch,
    /// Hashes of keys and of queries.
    key_bits: Scratch,
    query_bits: Scratch,
    /// Shares of the parameters' gradients.
    shares: Scratch,
    /// Of passes for any shape.
    any: [Scratch; 13],
}

/// The CUDA executor.
pub(crate) struct CudaRace {
    ctx: Arc<Context>,
    geometry: Geometry,
    /// Hyperplanes, `[sets, ensembles * tables * planes, head_dim]`.
    planes: Buffer,
    /// Elements from one head's hyperplanes to the next's; 0 where they share one set.
    planes_stride: u64,
    /// β and the centring constant of each kv head.
    heads: Buffer,
    /// Values of β: one, or one per kv head.
    betas: usize,
    causal: bool,
    /// Factor of a bucket normalisation's sum, of one ensemble.
    weight: f32,
    workspace: Workspace,
}

impl CudaRace {
    #[allow(clippy::new_ret_no_self, reason = "what a device makes of a configuration is an executor")]
    pub fn new(
        ctx: Arc<Context>,
        config: &RaceConfig,
        shape: &RaceShape,
        parameters: &Parameters,
    ) -> Result<Box<dyn RaceExecutor>> {
        let op = "new";
        ctx.check_alive(op)?;
        let geometry = Geometry::new(config, shape);
        let buckets = geometry.buckets() as f32;
        let weight = match config.normalization {
            Normalization::Ratio => 1.0,
            Normalization::BucketMean => 1.0 / buckets,
            Normalization::BucketSum => config.tables as f32 / buckets,
        };
        let (planes, planes_stride) = upload(&ctx, op, parameters)?;
        let heads = heads(&ctx, op, &geometry, parameters)?;
        let (betas, causal, workspace) = (parameters.beta.values().len(), config.causal, Workspace::default());
        Ok(Box::new(Self { ctx, geometry, planes, planes_stride, heads, betas, causal, weight, workspace }))
    }

    fn key(&self, kernel: Kernel) -> Key {
        Key { kernel, geometry: self.geometry }
    }
}

fn upload(ctx: &Arc<Context>, op: &'static str, parameters: &Parameters) -> Result<(Buffer, u64)> {
    let planes = &parameters.planes;
    let buffer = ctx.buffer_with(op, bytemuck::cast_slice(&planes.rows))?;
    let stride = if planes.sets == 1 { 0 } else { (planes.bits * planes.head_dim) as u64 };
    Ok((buffer, stride))
}

fn heads(ctx: &Arc<Context>, op: &'static str, geometry: &Geometry, parameters: &Parameters) -> Result<Buffer> {
    let betas = (0..geometry.num_kv_heads).map(|head| parameters.beta.of_head(head));
    let heads: Vec<[f32; 2]> = betas.map(|beta| [beta, centre(beta, geometry.planes)]).collect();
    ctx.buffer_with(op, bytemuck::cast_slice(&heads))
}

impl RaceExecutor for CudaRace {
    /// Into memory of their own: graphs captured before keep the old ones.
    fn set_parameters(&mut self, parameters: &Parameters) -> Result<()> {
        let op = "set_parameters";
        let (planes, stride) = upload(&self.ctx, op, parameters)?;
        self.heads = heads(&self.ctx, op, &self.geometry, parameters)?;
        (self.planes, self.planes_stride) = (planes, stride);
        self.betas = parameters.beta.values().len();
        Ok(())
    }

    fn new_state(&self, op: &'static str, batch: usize) -> Result<StateStorage> {
        Ok(StateStorage::Cuda(self.zero_state(op, batch)?))
    }

    fn fork(&self, op: &'static str, state: &StateStorage) -> Result<StateStorage> {
        Ok(StateStorage::Cuda(self.copy_state(op, state.cuda(op)?)?))
    }

    fn new_sums(&self, op: &'static str) -> Result<ParameterSums> {
        Ok(ParameterSums::Cuda(self.zero_sums(op)?))
    }

    fn forward(
        &mut self,
        rec: Recording<'_>,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &mut StateStorage,
    ) -> Result<Option<Tensor>> {
        let op = call.op;
        self.ctx.check_alive(op)?;
        rec.only_run(op)?;
        let state = self.own_state(op, state.cuda_mut(op)?)?;
        if call.pass == Pass::Causal && call.tokens == 1 {
            return self.step(call, inputs, state).map(Some);
        }
        self.fold(op, state)?;
        if let Some(gait) = self.walks(call, inputs, false) {
            let walk = match self.staged(call, inputs, false) {
                Ok(staged) if staged.aligned() => self.walk_forward(call, &staged, state, gait).map(Some),
                other => other.map(|_| None),
            };
            match walk {
                Ok(Some((ready, o))) => return ready.run(&self.ctx, op).map(|()| o),
                // What the device has no room for at once goes piece by piece; nothing has run yet.
                Ok(None) | Err(Error::OutOfMemory { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.any_forward(call, inputs, state)
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
        self.ctx.check_alive(op)?;
        let state = self.own_state(op, state.cuda(op)?)?;
        let gradient = self.own_state(op, grad_state.cuda_mut(op)?)?;
        let sums = &*sums.cuda_mut(op)?;
        self.own_sums(op, sums)?;
        self.fold(op, state)?;
        if let Some(gait) = self.walks(call, inputs, true) {
            let walk = match self.staged(call, inputs, true) {
                Ok(staged) if staged.aligned() => {
                    self.walk_backward(call, &staged, state, gradient, sums, gait).map(Some)
                }
                other => other.map(|_| None),
            };
            match walk {
                Ok(Some((ready, gradients))) => return ready.run(&self.ctx, op).map(|()| gradients),
                // As above; pieces have gradients of f32 alone.
                Err(Error::OutOfMemory { .. }) if call.gradients == DType::F32 => {}
                Ok(None) => {}
                Err(error) => return Err(error),
            }
        }
        call.wide_gradients("what the tensor cores do not take (see RaceOptions::gradients)")?;
        self.any_backward(call, inputs, state, gradient, sums)
    }

    fn finish_sums(&self, op: &'static str, sums: ParameterSums) -> Result<(Tensor, Tensor)> {
        self.total(op, sums.cuda(op)?)
    }

    fn export(&self, op: &'static str, state: &StateStorage) -> Result<StateData> {
        self.export_state(op, state.cuda(op)?)
    }

    fn import(&self, op: &'static str, data: &StateData) -> Result<StateStorage> {
        self.import_state(op, data)
    }

    fn warm_up(&self, output: DType) -> WarmUp {
        let pass = if self.causal { Pass::Causal } else { Pass::Absorb };
        let call = Call { op: "warm_up", pass, lengths: vec![2], tokens: 2, output, gradients: DType::F32, into: None };
        let mut kernels = vec![Kernel::Scan { reverse: false }];
        match self.walks(&call, &Inputs::default(), false) {
            Some(walk::Gait { terms, fit }) => {
                kernels.extend([Kernel::Sums { terms }, Kernel::Forward { terms, fit, output }]);
            }
            None => kernels.extend([Kernel::Hash { queries: false }, Kernel::ChunkSums]),
        }
        if !self.causal || self.walks(&call, &Inputs::default(), false).is_none() {
            let read = !self.causal;
            kernels.extend([Kernel::Hash { queries: true }, Kernel::ReadWeights { read }]);
            kernels.extend([Kernel::Products, Kernel::Output { output, read }]);
        }
        if self.causal {
            kernels.extend(self.geometry.step_channels().map(|channels| Kernel::Step { output, channels }));
            kernels.push(Kernel::Fold);
        }
        let boxed = |kernel| Box::new(self.key(kernel)) as Box<dyn KernelKey>;
        WarmUp::cuda(self.ctx.clone(), kernels.into_iter().map(boxed).collect())
    }
}
