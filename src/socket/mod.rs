//! SOCKET: sparse attention for decoding by soft collisions of hashed keys (arXiv 2602.06283).

pub(crate) mod cache;
pub(crate) mod config;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod executor;
#[cfg(feature = "wgpu")]
pub(crate) mod gpu;
mod persist;
pub(crate) mod plan;
pub(crate) mod problem;
pub mod reference;
