//! The CUDA executor.

use crate::engine::cuda::{Buffer, Context};
use crate::error::{Error, Result};
use crate::race::config::{Parameters, RaceConfig, RaceShape};
use crate::race::executor::RaceExecutor;
use std::sync::Arc;

/// A state on a CUDA device.
#[derive(Debug)]
pub(crate) struct CudaState {
    pub buffer: Buffer,
}

impl CudaState {
    pub fn bytes(&self) -> u64 {
        self.buffer.size()
    }
}

/// Sums of parameters' gradients on a CUDA device.
#[derive(Debug)]
pub(crate) struct CudaParameterSums;

/// The CUDA executor.
pub(crate) struct CudaRace;

impl CudaRace {
    #[allow(clippy::new_ret_no_self, reason = "it is to come")]
    pub fn new(_: Arc<Context>, _: &RaceConfig, _: &RaceShape, _: &Parameters) -> Result<Box<dyn RaceExecutor>> {
        let why = "RACE on CUDA is not there yet; take the GPU through Vulkan (the feature `wgpu`)".into();
        Err(Error::Unsupported { op: "new", why })
    }
}

/// Every kernel of this room, for the table of resources.
#[cfg(test)]
pub(crate) fn test_keys() -> Vec<Box<dyn crate::engine::cuda::KernelKey>> {
    Vec::new()
}
