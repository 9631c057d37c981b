//! What the executors stand on: nothing here knows about attention.

pub(crate) mod cpu;
#[cfg(feature = "wgpu")]
pub(crate) mod gpu;
