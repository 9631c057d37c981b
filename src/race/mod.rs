//! RACE: linear-time attention by soft hashing (arXiv 2510.04008).

pub(crate) mod attention;
pub(crate) mod config;
pub(crate) mod cpu;
pub(crate) mod executor;
#[cfg(feature = "wgpu")]
pub(crate) mod gpu;
#[cfg(feature = "wgpu")]
pub(crate) mod plan;
pub mod reference;
pub(crate) mod state;
