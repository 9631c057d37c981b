//! The CUDA engine: context, kernels, memory, launches, readback, timing. It knows nothing of what is computed.
//!
//! All work of a context goes through one stream, its own or its host's, and everything is in that stream's order: no
//! call waits for the device but reads ([`Context::read_buffer`]) and [`Context::settle`]. Results are allocated by the
//! call that computes them, from a pool in the stream's order ([`memory`]); scratch memory stays with its owner. So a
//! step whose scratch is warm may be captured into a graph: nothing in it allocates on the stream, waits, or touches
//! another stream. A capture takes the memory of its results beside the graph and keeps it as long as the graph.
//!
//! `unsafe` is the driver's: each block says why the call is allowed. What no block can say by itself is that kernels
//! stay within their memory; that is the plans' part, as on the wgpu path.

mod cache;
mod caps;
mod compile;
mod context;
mod driver;
mod graph;
mod include;
mod input;
mod memory;
mod module;
mod passes;
mod readback;
mod scratch;
mod timing;

#[cfg(test)]
pub(crate) mod resources;
#[cfg(test)]
mod tests;

pub(crate) use cache::Place;
#[cfg(test)]
pub(crate) use caps::BULK_COPIES;
pub(crate) use context::Context;
pub(crate) use driver::{Found, devices, driver};
pub use graph::CudaGraph;
pub(crate) use input::{Input, Strides, stage};
pub(crate) use memory::{Buffer, bytes_of};
pub(crate) use module::{Kernel, KernelKey, KernelSource};
#[cfg(test)]
pub(crate) use passes::WriteKey;
pub(crate) use passes::{Bind, Grid, Passes, Ready, Stage};
pub(crate) use scratch::Scratch;
pub use timing::CudaTimer;
#[cfg(test)]
pub(crate) use timing::Timer;

/// What every kernel may include.
pub(crate) const HEADERS: &[(&str, &str)] =
    &[("numbers.cuh", include_str!("../../../shaders/cuda/common/numbers.cuh"))];
