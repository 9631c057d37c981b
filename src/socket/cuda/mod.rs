//! The CUDA executor.

pub(crate) mod merge;

use crate::engine::cuda::Context;
use crate::error::{Error, Result};
use crate::socket::executor::Executor;
use crate::socket::problem::CacheSpec;
use std::sync::Arc;

/// The CUDA executor.
pub(crate) struct CudaExecutor;

impl CudaExecutor {
    #[allow(clippy::new_ret_no_self, reason = "it is to come")]
    pub fn new(_: Arc<Context>, _: &CacheSpec) -> Result<Box<dyn Executor>> {
        let why = "SOCKET on CUDA is not there yet; take the GPU through Vulkan (the feature `wgpu`)".into();
        Err(Error::Unsupported { op: "new", why })
    }
}

/// Every kernel of this room, for the table of resources.
#[cfg(test)]
pub(crate) fn test_keys() -> Vec<Box<dyn crate::engine::cuda::KernelKey>> {
    use crate::tensor::DType;
    let dtypes = [DType::F32, DType::F16, DType::Bf16];
    let merges = dtypes.iter().flat_map(|&o1| dtypes.map(|o2| merge::MergeKey { o1, o2 }));
    merges.map(|key| Box::new(key) as Box<dyn crate::engine::cuda::KernelKey>).collect()
}
