//! The CPU executor: chunks of tokens as matrix products, with sums in f32 inside a chunk and in f64 beyond it.
//!
//! Memory beyond inputs and results: each thread holds a few tiles of a chunk (32 or 64 tokens). The backward of the
//! causal pass also holds, per thread, the states before a block's chunks, 4·S·(Dv + 1) bytes each (times ensembles): up to
//! 16 MiB of them, or 32 to 256 where so many take more. Of a call of several blocks it keeps 8·S·(Dv + 1) bytes for each
//! block: at most S·(Dv + 1)/128 bytes a token of the heads under way, 8 for S = 8 and Dv = 128, whose inputs take 1536.
//!
//! Where rayon has more threads than the call has sequences and heads, results depend on the number of threads, by no
//! more than rounding.

mod backward;
mod hash;
mod mass;
mod plan;
mod spans;
#[cfg(test)]
mod tests;
mod tile;
mod window;
mod window_blocks;
mod window_ring;
mod worker;

pub(crate) use window::CpuWindow;
pub(crate) use window_ring::CpuRing;

use crate::engine::Recording;
use crate::engine::cpu::memory::zeros;
use crate::engine::cpu::simd::Level;
use crate::error::Result;
use crate::race::config::{Parameters, RaceConfig, RaceShape};
use crate::race::executor::{
    Call, InputGradients, Inputs, ParameterSums, RaceExecutor, StateData, StateStorage, needed,
};
use crate::tensor::convert::encode;
use crate::tensor::{DType, Tensor};
use backward::Outputs;
use plan::{Hashes, Plan, copied};
use spans::Job;
use tile::{Room, Source};
use worker::{Tensors, Wide};

/// A and B in f64, `[batch, num_kv_heads, ensembles, buckets]` and that times `value_dim`.
#[derive(Clone, Debug)]
pub(crate) struct CpuState {
    pub a: Vec<f64>,
    pub b: Vec<f64>,
}

impl CpuState {
    pub fn bytes(&self) -> u64 {
        ((self.a.len() + self.b.len()) * 8) as u64
    }

    fn zeros(op: &'static str, plan: &Plan, units: usize) -> Result<Self> {
        let (a, b) = (units.saturating_mul(plan.masses()), units.saturating_mul(plan.sums()));
        Ok(Self { a: zeros(op, a)?, b: zeros(op, b)? })
    }

    fn copy(&self, op: &'static str) -> Result<Self> {
        Ok(Self { a: copied(op, &self.a)?, b: copied(op, &self.b)? })
    }

    /// That of one sequence and kv head.
    fn unit(&self, plan: &Plan, i: usize) -> (&[f64], &[f64]) {
        let (a, b) = (plan.masses(), plan.sums());
        (&self.a[i * a..(i + 1) * a], &self.b[i * b..(i + 1) * b])
    }

    /// Those of all sequences and kv heads.
    fn units(&mut self, plan: &Plan) -> Vec<Wide<'_>> {
        let parts = self.a.chunks_exact_mut(plan.masses()).zip(self.b.chunks_exact_mut(plan.sums()));
        parts.map(|(a, b)| Wide { a, b }).collect()
    }
}

/// Gradients of β and of the hyperplanes, in f64.
#[derive(Clone, Debug)]
pub(crate) struct CpuParameterSums {
    pub beta: Vec<f64>,
    pub planes: Vec<f64>,
}

/// The CPU executor.
pub(crate) struct CpuRace {
    plan: Plan,
    shape: RaceShape,
    hashes: Hashes,
    /// Sets, hyperplanes per set, and channels.
    planes: [usize; 3],
}

impl CpuRace {
    pub fn new(config: &RaceConfig, shape: &RaceShape, parameters: &Parameters) -> Result<Self> {
        Self::with_level(Level::best(), config, shape, parameters)
    }

    fn with_level(level: Level, config: &RaceConfig, shape: &RaceShape, parameters: &Parameters) -> Result<Self> {
        let plan = Plan::new(level, config, shape);
        let hashes = Hashes::new(&plan, parameters)?;
        let planes = [parameters.planes.sets, parameters.planes.bits, parameters.planes.head_dim];
        Ok(Self { plan, shape: *shape, hashes, planes })
    }

    /// The inputs that a pass takes.
    fn tensors<'a>(&self, call: &Call, inputs: &Inputs<'a>, backward: bool) -> Result<Tensors<'a>> {
        let op = call.op;
        let source = |name, view, wanted: bool| -> Result<Option<Source<'a>>> {
            if wanted { Ok(Some(Source::new(op, name, needed(op, name, view)?)?)) } else { Ok(None) }
        };
        Ok(Tensors {
            q: source("q", inputs.q, call.pass.reads())?,
            k: source("k", inputs.k, call.pass.absorbs())?,
            v: source("v", inputs.v, call.pass.absorbs())?,
            grad_o: source("grad_o", inputs.grad_o, backward && call.pass.reads())?,
        })
    }

    fn room(&self, call: &Call, dtype: DType, heads: usize, dim: usize, wanted: bool) -> Result<Option<Room>> {
        wanted.then(|| Room::new(call.op, dtype, [call.batch(), call.tokens, heads, dim])).transpose()
    }
}

impl RaceExecutor for CpuRace {
    fn set_parameters(&mut self, parameters: &Parameters) -> Result<()> {
        self.hashes = Hashes::new(&self.plan, parameters)?;
        self.planes = [parameters.planes.sets, parameters.planes.bits, parameters.planes.head_dim];
        Ok(())
    }

    fn new_state(&self, op: &'static str, batch: usize) -> Result<StateStorage> {
        Ok(StateStorage::Cpu(CpuState::zeros(op, &self.plan, batch.saturating_mul(self.plan.kv_heads))?))
    }

    fn fork(&self, op: &'static str, state: &StateStorage) -> Result<StateStorage> {
        Ok(StateStorage::Cpu(state.cpu(op)?.copy(op)?))
    }

    fn new_sums(&self, op: &'static str) -> Result<ParameterSums> {
        let planes = zeros(op, self.planes.iter().product())?;
        Ok(ParameterSums::Cpu(CpuParameterSums { beta: zeros(op, self.hashes.betas())?, planes }))
    }

    fn forward(
        &mut self,
        _: Recording<'_>,
        call: &Call,
        inputs: &Inputs<'_>,
        state: &mut StateStorage,
    ) -> Result<Option<Tensor>> {
        let state = state.cpu_mut(call.op)?;
        let tensors = self.tensors(call, inputs, false)?;
        let s = &self.shape;
        let mut o = self.room(call, call.output, s.num_q_heads, s.value_dim, call.pass.reads())?;
        let job = Job::new(&self.plan, &self.hashes, tensors, call, false)?;
        job.forward(state, o.as_mut().map(Room::rows).as_ref());
        Ok(o.map(Room::finish))
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
        let (state, gradient, sums) = (state.cpu(op)?, grad_state.cpu_mut(op)?, sums.cpu_mut(op)?);
        let tensors = self.tensors(call, inputs, true)?;
        let (s, reads, absorbs) = (&self.shape, call.pass.reads(), call.pass.absorbs());
        let mut dq = self.room(call, call.gradients, s.num_q_heads, s.head_dim, reads)?;
        let mut dk = self.room(call, call.gradients, s.num_kv_heads, s.head_dim, absorbs)?;
        let mut dv = self.room(call, call.gradients, s.num_kv_heads, s.value_dim, absorbs)?;
        let rows = [dq.as_mut().map(Room::rows), dk.as_mut().map(Room::rows), dv.as_mut().map(Room::rows)];
        let out = Outputs { dq: rows[0].as_ref(), dk: rows[1].as_ref(), dv: rows[2].as_ref() };
        Job::new(&self.plan, &self.hashes, tensors, call, true)?.backward(state, gradient, sums, out)?;
        Ok(InputGradients { dq: dq.map(Room::finish), dk: dk.map(Room::finish), dv: dv.map(Room::finish) })
    }

    fn finish_sums(&self, op: &'static str, sums: ParameterSums) -> Result<(Tensor, Tensor)> {
        let sums = sums.cpu(op)?;
        let narrow = |x: &[f64]| encode(DType::F32, &x.iter().map(|&x| x as f32).collect::<Vec<_>>());
        let beta = Tensor::host(DType::F32, vec![sums.beta.len()], narrow(&sums.beta));
        Ok((beta, Tensor::host(DType::F32, self.planes.to_vec(), narrow(&sums.planes))))
    }

    fn export(&self, op: &'static str, state: &StateStorage) -> Result<StateData> {
        let CpuState { a, b } = state.cpu(op)?.copy(op)?;
        Ok(StateData { a, b })
    }

    fn import(&self, op: &'static str, data: &StateData) -> Result<StateStorage> {
        Ok(StateStorage::Cpu(CpuState { a: copied(op, &data.a)?, b: copied(op, &data.b)? }))
    }
}
