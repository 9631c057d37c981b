//! The wgpu executor.

use crate::engine::Recording;
use crate::engine::gpu::Context;
use crate::error::{Error, Result};
use crate::race::config::{Parameters, RaceConfig, RaceShape};
use crate::race::executor::{Call, InputGradients, Inputs, ParameterSums, RaceExecutor, StateData, StateStorage};
use crate::tensor::Tensor;
use std::sync::Arc;

/// A and B on a GPU.
#[derive(Debug)]
pub(crate) struct GpuState {}

impl GpuState {
    pub fn bytes(&self) -> u64 {
        0
    }
}

/// Gradients of β and hyperplanes on a GPU.
#[derive(Debug)]
pub(crate) struct GpuParameterSums {}

/// The wgpu executor.
pub(crate) struct GpuRace {}

fn missing(op: &'static str) -> Error {
    Error::Unsupported { op, why: "RACE on a GPU".into() }
}

impl GpuRace {
    pub fn new(_: Arc<Context>, _: &RaceConfig, _: &RaceShape, _: &Parameters) -> Result<Self> {
        Ok(Self {})
    }
}

impl RaceExecutor for GpuRace {
    fn set_parameters(&mut self, _: &Parameters) -> Result<()> {
        Err(missing("set_parameters"))
    }
    fn new_state(&self, op: &'static str, _: usize) -> Result<StateStorage> {
        Err(missing(op))
    }
    fn fork(&self, op: &'static str, _: &StateStorage) -> Result<StateStorage> {
        Err(missing(op))
    }
    fn new_sums(&self, op: &'static str) -> Result<ParameterSums> {
        Err(missing(op))
    }
    fn forward(
        &mut self,
        _: Recording<'_>,
        call: &Call,
        _: &Inputs<'_>,
        _: &mut StateStorage,
    ) -> Result<Option<Tensor>> {
        Err(missing(call.op))
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
    fn export(&self, op: &'static str, _: &StateStorage) -> Result<StateData> {
        Err(missing(op))
    }
    fn import(&self, op: &'static str, _: &StateData) -> Result<StateStorage> {
        Err(missing(op))
    }
}
