//! What the executors stand on: nothing here knows about attention.

pub(crate) mod cpu;
#[cfg(feature = "wgpu")]
pub(crate) mod gpu;

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
