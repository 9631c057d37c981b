//! What the executors stand on: nothing here knows about attention.

pub(crate) mod cpu;
#[cfg(feature = "wgpu")]
pub(crate) mod gpu;

use crate::error::Result;

#[cfg(feature = "wgpu")]
type Kernels = (std::sync::Arc<gpu::Context>, Vec<Box<dyn gpu::KernelKey>>);

/// Kernels to compile ahead; none where there is no compiler. Nothing happens until it is run.
#[derive(Default)]
pub(crate) struct WarmUp {
    #[cfg(feature = "wgpu")]
    kernels: Option<Kernels>,
}

impl WarmUp {
    #[cfg(feature = "wgpu")]
    pub fn new(ctx: std::sync::Arc<gpu::Context>, keys: Vec<Box<dyn gpu::KernelKey>>) -> Self {
        Self { kernels: Some((ctx, keys)) }
    }

    /// Compiles, and waits for it.
    pub fn run(self) -> Result<()> {
        #[cfg(feature = "wgpu")]
        if let Some((ctx, keys)) = self.kernels {
            return ctx.warm_up(&keys);
        }
        Ok(())
    }

    /// Compiles without holding the polling thread.
    pub async fn run_async(self) -> Result<()> {
        #[cfg(feature = "wgpu")]
        if let Some((ctx, keys)) = self.kernels {
            return ctx.warm_up_async(keys).await;
        }
        Ok(())
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
