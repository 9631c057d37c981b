#![doc = include_str!("../README.md")]
//!
//! # Rooms
//! | room | what it holds |
//! |---|---|
//! | [`Device`] | choosing and reporting what runs the work |
//! | [`SocketCache`] | keys, values and their index; sparse, dense and prefill attention |
//! | [`Race`] | linear-time attention, forward and backward |
//! | [`socket::reference`], [`race::reference`] | the formulas in f64, for reading and for tests |
//! | [`TensorView`], [`Tensor`] | what goes in, what comes out |

#![deny(missing_docs)]

#[cfg(all(test, feature = "cuda"))]
mod cuda_kernels;
mod device;
mod engine;
mod error;
mod file;
mod lsh;
mod merge;
pub mod race;
pub mod socket;
mod tensor;

#[cfg(feature = "cuda")]
pub use device::CudaReport;
#[cfg(feature = "wgpu")]
pub use device::Requirements;
pub use device::{AdapterSummary, Device, DeviceOptions, GpuReport, KernelReport, KernelResources, Report};
#[cfg(feature = "cuda")]
pub use engine::cuda::CudaGraph;
pub use error::{Error, Result};
pub use lsh::{Hyperplanes, MAX_PLANES, MAX_TABLES};
pub use merge::merge_state;
pub use race::attention::{Race, RaceGradients, RaceOptions, RaceOutput};
pub use race::config::{Beta, Gate, Normalization, RaceConfig, RaceShape};
#[cfg(feature = "mmap")]
pub use race::source::SafetensorsSource;
pub use race::source::{HostSource, ResidentSource};
pub use race::state::{RaceState, StateGradient, StateParts, StateShape, WindowShape};
pub use race::stream::{
    Boundaries, OnProgress, OutputSink, Segment, SegmentSource, StreamFailure, StreamOptions, StreamProgress, Wanted,
};
#[cfg(not(target_arch = "wasm32"))]
pub use race::stream_backward::{BackwardStream, GradientSink, SegmentGradients, StreamGradients};
pub use socket::cache::{DEFAULT_PAGE_TOKENS, DecodeOptions, Mode, SocketCache};
pub use socket::config::{Budget, CacheShape, Rule, Scoring, SelectionScope, SocketConfig, Temperature};
pub use socket::executor::{Attended, Memory, Selection, StageTime};
#[doc(hidden)]
pub use socket::plan::LeastBytes;
pub use tensor::{DType, HostTensor, Tensor, TensorView};

#[cfg(feature = "cuda")]
#[doc(hidden)]
pub use engine::cuda::CudaTimer;
#[cfg(feature = "wgpu")]
#[doc(hidden)]
pub use engine::gpu::Timer;

/// The wgpu that the public API speaks; a lent device must come from it.
#[cfg(feature = "wgpu")]
pub use wgpu;

/// The cudarc that the public API speaks; a lent stream must come from it.
#[cfg(feature = "cuda")]
pub use cudarc;
