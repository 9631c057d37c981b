//! What the executors stand on: nothing here knows about attention.

pub(crate) mod cpu;
#[cfg(feature = "cuda")]
pub(crate) mod cuda;
#[cfg(feature = "wgpu")]
pub(crate) mod gpu;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) mod lost;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) mod seal;
#[cfg(any(feature = "cuda", all(feature = "wgpu", not(target_arch = "wasm32"))))]
pub(crate) mod waiter;

#[cfg(feature = "cuda")]
use crate::error::Error;
use crate::error::Result;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use std::sync::Arc;

/// Locks a mutex; a panic of another holder leaves nothing half-written in the engines, so its mark is ignored.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Element offset and strides of an input as kernels read them.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, bytemuck::Pod, bytemuck::Zeroable)]
pub(crate) struct Strides {
    pub offset: u32,
    pub batch: u32,
    pub token: u32,
    pub head: u32,
}

#[cfg(feature = "wgpu")]
impl Strides {
    /// Whether every row begins at a multiple of four elements, so that whole vectors of four can be read.
    pub fn in_fours(&self) -> bool {
        [self.offset, self.batch, self.token, self.head].iter().all(|x| x.is_multiple_of(4))
    }
}

/// Kernels to compile ahead; none where there is no compiler. Nothing happens until it is run.
#[derive(Default)]
pub(crate) enum WarmUp {
    #[default]
    Nothing,
    #[cfg(feature = "wgpu")]
    Gpu(Arc<gpu::Context>, Vec<Box<dyn gpu::KernelKey>>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<cuda::Context>, Vec<Box<dyn cuda::KernelKey>>),
}

impl WarmUp {
    #[cfg(feature = "wgpu")]
    pub fn new(ctx: Arc<gpu::Context>, keys: Vec<Box<dyn gpu::KernelKey>>) -> Self {
        Self::Gpu(ctx, keys)
    }

    #[cfg(feature = "cuda")]
    pub fn cuda(ctx: Arc<cuda::Context>, keys: Vec<Box<dyn cuda::KernelKey>>) -> Self {
        Self::Cuda(ctx, keys)
    }

    /// Compiles, and waits for it.
    pub fn run(self) -> Result<()> {
        match self {
            Self::Nothing => Ok(()),
            #[cfg(feature = "wgpu")]
            Self::Gpu(ctx, keys) => ctx.warm_up(&keys),
            #[cfg(feature = "cuda")]
            Self::Cuda(ctx, keys) => ctx.warm_up(&keys),
        }
    }

    /// Compiles without holding the polling thread.
    pub async fn run_async(self) -> Result<()> {
        match self {
            Self::Nothing => Ok(()),
            #[cfg(feature = "wgpu")]
            Self::Gpu(ctx, keys) => ctx.warm_up_async(keys).await,
            #[cfg(feature = "cuda")]
            Self::Cuda(ctx, keys) => ctx.warm_up_async(keys).await,
        }
    }
}

/// Where commands go: run now, or into the caller's encoder.
pub(crate) enum Recording<'a> {
    /// Submit at once.
    Run,
    /// Leave the commands in the caller's encoder.
    #[cfg(feature = "wgpu")]
    Into(&'a mut wgpu::CommandEncoder),
    /// Keeps the lifetime in use where no GPU path is built.
    #[cfg(not(feature = "wgpu"))]
    #[allow(dead_code)]
    Never(std::marker::PhantomData<&'a ()>),
}

impl Recording<'_> {
    /// The same place, for a part of the commands that go there.
    pub fn part(&mut self) -> Recording<'_> {
        match self {
            Self::Run => Recording::Run,
            #[cfg(feature = "wgpu")]
            Self::Into(encoder) => Recording::Into(encoder),
            #[cfg(not(feature = "wgpu"))]
            Self::Never(_) => Recording::Never(std::marker::PhantomData),
        }
    }
}

#[cfg(feature = "cuda")]
impl Recording<'_> {
    /// On CUDA the stream is what commands are recorded into: work is submitted at once, and graphs are captured.
    pub fn only_run(&self, op: &'static str) -> Result<()> {
        match self {
            Self::Run => Ok(()),
            #[cfg(feature = "wgpu")]
            Self::Into(_) => {
                let why = "a wgpu encoder takes no CUDA work; call it without one, or capture it (Device::capture)";
                Err(Error::Unsupported { op, why: why.into() })
            }
            #[cfg(not(feature = "wgpu"))]
            Self::Never(_) => Err(Error::Unsupported { op, why: "there is nothing to record into".into() }),
        }
    }
}
