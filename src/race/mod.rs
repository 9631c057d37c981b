//! RACE: linear-time attention by soft hashing (arXiv 2510.04008).

pub(crate) mod attention;
pub(crate) mod config;
pub(crate) mod cpu;
pub(crate) mod executor;
#[cfg(feature = "wgpu")]
pub(crate) mod gpu;
mod persist;
pub mod reference;
pub(crate) mod source;
pub(crate) mod state;
pub(crate) mod stream;
#[cfg(not(target_arch = "wasm32"))]
pub(crate) mod stream_backward;
