//! RACE: linear-time attention by soft hashing (arXiv 2510.04008).
//!
//! | room | what it holds |
//! |---|---|
//! | `config` | what the caller chooses, checked |
//! | `attention`, `states` | [`crate::Race`]: forward, backward, append; states in and out |
//! | `stream`, `stream_backward`, `source` | sequences of any length |
//! | `state`, `persist` | what is kept of a sequence |
//! | `executor` | what a backend must do: three passes, forward and backward |
//! | `window` | exact attention over the last tokens, mixed in by a gate per head |
//! | [`mod@reference`] | the formulas in f64 |
//! | `cpu`, `gpu`, `cuda` | the executors |
//!
//! The ring of the window belongs to the state (a fork copies it, a saved state has two tensors more), so `append` and the
//! streams are the same with a window and without: a segment's first tokens read the ring that the segment before left.
//! Both halves see the same q, k, v, so the mix is a sum of two outputs and of two sets of gradients.

pub(crate) mod attention;
pub(crate) mod config;
pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
pub(crate) mod executor;
#[cfg(feature = "wgpu")]
pub(crate) mod gpu;
mod persist;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) mod plan;
pub mod reference;
pub(crate) mod source;
pub(crate) mod state;
mod states;
pub(crate) mod stream;
#[cfg(not(target_arch = "wasm32"))]
pub(crate) mod stream_backward;
pub(crate) mod window;
