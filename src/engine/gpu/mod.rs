//! The wgpu engine: context, pipelines, parameters, readback, timing. It knows nothing of what is computed.

mod arena;
mod assemble;
mod caps;
mod context;
mod input;
mod open;
mod passes;
mod pipeline;
mod readback;
mod results;
mod scratch;
mod timing;
mod trace;

#[cfg(test)]
pub(crate) mod shader_tests;
#[cfg(test)]
pub(crate) mod tests;

pub(crate) use assemble::{Assembler, dtype_define};
pub(crate) use caps::{is_software, requirements};
pub(crate) use context::{Context, Setup};
pub(crate) use input::{Input, stage, staged_bytes};
pub(crate) use open::{adapters_best_first, open};
pub(crate) use passes::{Bind, GridParams, Passes, Ready, Stage};
#[cfg(test)]
pub(crate) use pipeline::Binding;
pub(crate) use pipeline::{KernelKey, KernelSource, Pipeline};
pub(crate) use results::ResultBuffer;
pub(crate) use scratch::Scratch;
pub use timing::Timer;

pub(crate) use super::Strides;
