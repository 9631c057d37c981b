//! What a device can do.

use super::compile::{Arch, supported};
use super::driver::{Version, attribute};
use crate::error::{Error, Result};
use cudarc::driver::CudaContext;
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::CUdevice_attribute_enum as Attribute;

/// Compute capability times ten from which on there are copies of runs of bytes and barriers that count them.
pub(crate) const BULK_COPIES: i32 = 90;

/// What was found out about a device.
#[derive(Clone, Debug)]
pub(crate) struct Caps {
    pub name: String,
    pub ordinal: usize,
    /// Major and minor compute capability.
    pub capability: (i32, i32),
    pub driver: Version,
    pub nvrtc: Version,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block can have, asked for.
    pub shared_memory: u32,
    /// Bytes of the L2 cache.
    pub l2_cache: u64,
    /// Bytes of device memory.
    pub memory: u64,
    /// Whether blocks can form clusters, and launches overlap.
    pub clusters: bool,
}

impl Caps {
    /// `versions` of driver and compiler.
    pub fn new(context: &CudaContext, versions: (Version, Version)) -> Result<Self, DriverError> {
        let device = context.cu_device();
        let ask = |which| attribute(device, which);
        let count = |which| ask(which).max(0) as u32;
        let capability = (
            ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR),
            ask(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR),
        );
        Ok(Self {
            name: result::device::get_name(device)?,
            ordinal: context.ordinal(),
            capability,
            driver: versions.0,
            nvrtc: versions.1,
            multiprocessors: count(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT),
            shared_memory: count(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN),
            l2_cache: count(Attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE).into(),
            // SAFETY: the device is that of a context that is open.
            memory: unsafe { result::device::total_mem(device) }? as u64,
            clusters: capability >= (9, 0),
        })
    }

    /// Whether kernels can have runs of bytes copied to shared memory by the hardware.
    pub fn bulk_copies(&self) -> bool {
        self.arch().is_ok_and(|arch| arch.has(BULK_COPIES))
    }

    /// What kernels are compiled for.
    pub(super) fn arch(&self) -> Result<Arch> {
        let supported = supported();
        Arch::choose(self.capability, &supported).ok_or_else(|| Error::Requirement {
            what: format!("the oldest GPU that NVRTC {} compiles for", self.nvrtc),
            got: supported.iter().min().map_or("unknown".into(), ToString::to_string),
            needed: format!("at most {}{}, as the GPU is {}", self.capability.0, self.capability.1, self.name),
        })
    }
}
