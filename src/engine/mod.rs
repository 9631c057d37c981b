//! What the executors stand on: nothing here knows about attention.

#[cfg(feature = "wgpu")]
pub(crate) mod gpu;
