//! The context: a device, the stream that all work of it goes through, what was found out about it, and calls that
//! return errors with the operation's name.

use super::cache::Place;
use super::caps::Caps;
use super::driver;
use super::graph::Capture;
use super::memory::Pool;
use super::module::{Kernel, KernelKey, Kernels};
use crate::engine::lost::Lost;
use crate::engine::waiter::Waiter;
use crate::error::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUresult, CUstreamCaptureMode, CUstreamCaptureStatus};
use cudarc::driver::{CudaContext, CudaStream};
use std::path::Path;
use std::sync::Arc;

/// A device, its stream and what was found out about them.
#[derive(Debug)]
pub(crate) struct Context {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    caps: Caps,
    lost: Lost,
    kernels: Kernels,
    pub(super) pool: Pool,
    pub(super) capture: Capture,
    pub(super) waiter: Waiter,
}

impl Context {
    /// Opens device `ordinal`, with a stream of its own.
    pub fn open(ordinal: usize, place: Place) -> Result<Arc<Self>> {
        let op = "open device";
        driver::versions()?;
        let found = driver::devices();
        if ordinal >= found.len() {
            let names: Vec<_> = found.iter().map(|device| format!("cuda:{} {}", device.ordinal, device.name)).collect();
            return Err(Error::NoAdapter { wanted: format!("cuda:{ordinal}"), found: names.join(", ") });
        }
        let failed = |error| unopened(op, &format!("cuda:{ordinal}: "), error);
        let stream = outside_capture(|| {
            let context = CudaContext::new(ordinal)?;
            // SAFETY: no slices are made between the two. With tracking on, the first stream would wait for all work of
            // the GPU's context, which others may be using, and break off what they capture.
            unsafe { context.disable_event_tracking() };
            let stream = context.new_stream();
            // SAFETY: as above.
            unsafe { context.enable_event_tracking() };
            stream
        })
        .map_err(failed)?;
        Self::new(stream, place)
    }

    /// Works on a host's own stream, in its context.
    pub fn new(stream: Arc<CudaStream>, place: Place) -> Result<Arc<Self>> {
        let op = "open device";
        let versions = driver::versions()?;
        let context = stream.context().clone();
        let failed = |error| unopened(op, "", error);
        let caps = Caps::new(&context, versions).map_err(failed)?;
        driver::check_capability(&caps.name, caps.capability)?;
        let arch = caps.arch()?;
        bind(&context).map_err(failed)?;
        let pool = outside_capture(|| Pool::new(context.ordinal(), caps.memory)).map_err(failed)?;
        let kernels = Kernels::new(arch, versions, place);
        let (lost, capture, waiter) = (Lost::default(), Capture::default(), Waiter::default());
        let context = Self { context, stream, caps, lost, kernels, pool, capture, waiter };
        Ok(Arc::new(context))
    }

    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub fn stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    pub(super) fn cu_stream(&self) -> sys::CUstream {
        self.stream.cu_stream()
    }

    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    /// Whether memory of `other` can be used here.
    pub fn is_same(&self, other: sys::CUcontext) -> bool {
        self.context.cu_ctx() == other
    }

    /// [`Error::DeviceLost`] once the device is known to be gone.
    pub fn check_alive(&self, op: &'static str) -> Result<()> {
        self.lost.check(op)
    }

    /// Makes this the thread's current context; every call of the driver needs it.
    pub(super) fn bind(&self, op: &'static str) -> Result<()> {
        self.lost.check(op)?;
        self.check(op, bind(&self.context))
    }

    /// As [`Context::bind`] where nobody can be told of an error.
    pub(super) fn bind_quietly(&self) -> bool {
        bind(&self.context).is_ok()
    }

    /// The driver's answer with the operation's name; an error after which nothing works any more is the device's loss.
    pub fn check<T>(&self, op: &'static str, answer: Result<T, DriverError>) -> Result<T> {
        answer.map_err(|error| self.error(op, error))
    }

    pub(super) fn error(&self, op: &'static str, error: DriverError) -> Error {
        let message = driver::words(error);
        if driver::is_sticky(error.0) {
            self.lost.set(lost_words(&message));
        }
        match (self.lost.check(op), error.0) {
            (Err(lost), _) => lost,
            (_, CUresult::CUDA_ERROR_OUT_OF_MEMORY) => Error::Gpu { op, message: "the device is out of memory".into() },
            _ => Error::Gpu { op, message },
        }
    }

    /// Whether a graph is being captured from the stream, by this crate or by its host.
    pub fn is_capturing(&self) -> bool {
        // SAFETY: the stream lives as long as `self`.
        let status = unsafe { result::stream::is_capturing(self.cu_stream()) };
        status.is_ok_and(|status| status == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_ACTIVE)
    }

    /// Refuses what cannot be part of a graph, before the driver breaks the capture off.
    pub fn refuse_capture(&self, op: &'static str, what: &str) -> Result<()> {
        if !self.is_capturing() {
            return Ok(());
        }
        Err(Error::Unsupported { op, why: format!("{what} while a CUDA graph is captured") })
    }

    /// Waits until all work submitted so far is done.
    pub fn settle(&self, op: &'static str) -> Result<()> {
        self.bind(op)?;
        self.refuse_capture(op, "nothing can be waited for")?;
        // SAFETY: the stream lives as long as `self`.
        self.check(op, outside_capture(|| unsafe { result::stream::synchronize(self.cu_stream()) }))
    }

    /// The kernel of `key`, compiled at its first use; concurrent calls for one key compile once.
    pub fn kernel(&self, op: &'static str, key: &dyn KernelKey) -> Result<Arc<Kernel>> {
        self.lost.check(op)?;
        self.kernels.get(self, op, key)
    }

    /// Compiles all of `keys`, concurrently, and waits for them.
    pub fn warm_up(&self, keys: &[Box<dyn KernelKey>]) -> Result<()> {
        self.check_alive("warm_up")?;
        self.kernels.warm_up(self, keys)
    }

    /// As [`Context::warm_up`], without holding the thread that polls.
    pub async fn warm_up_async(self: Arc<Self>, keys: Vec<Box<dyn KernelKey>>) -> Result<()> {
        self.check_alive("warm_up")?;
        let ctx = self.clone();
        let run = move || ctx.kernels.warm_up(&ctx, &keys);
        let message = "the thread that compiles ended".to_string();
        self.waiter.run(run).await.unwrap_or(Err(Error::Gpu { op: "warm_up", message }))
    }

    /// The kernels compiled so far, sorted by label.
    pub fn compiled(&self) -> Vec<Arc<Kernel>> {
        self.kernels.compiled()
    }

    /// What the kernels are compiled for.
    pub fn arch(&self) -> String {
        self.kernels.arch().name()
    }

    /// Where compiled kernels are kept, if they are.
    pub fn cache_folder(&self) -> Option<&Path> {
        self.kernels.folder()
    }
}

/// A lost device in words: a process cannot get its context back.
fn lost_words(message: &str) -> String {
    format!("{message}; nothing runs on it any more until this process ends")
}

/// Why a device cannot be opened: one that work of this process broke before stays broken.
fn unopened(op: &'static str, prefix: &str, error: DriverError) -> Error {
    let message = format!("{prefix}{}", driver::words(error));
    match driver::is_sticky(error.0) {
        true => Error::DeviceLost { op, reason: lost_words(&message) },
        false => Error::Gpu { op, message },
    }
}

/// Runs calls that are no part of any capture, and that one under way might forbid: that of this thread, or one that the
/// host began for all threads.
pub(super) fn outside_capture<T>(body: impl FnOnce() -> T) -> T {
    let mut mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
    // SAFETY: exchanges this thread's mode with the one given; put back below.
    let exchanged = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) }.result();
    let value = body();
    if exchanged.is_ok() {
        // SAFETY: as above, with the mode that the driver returned.
        let _ = unsafe { sys::cuThreadExchangeStreamCaptureMode(&raw mut mode) };
    }
    value
}

/// Bound by hand: the bindings' own call also hands out errors that other users of the context left behind.
fn bind(context: &CudaContext) -> Result<(), DriverError> {
    if result::ctx::get_current()? == Some(context.cu_ctx()) {
        return Ok(());
    }
    // SAFETY: the context lives as long as `context`.
    unsafe { result::ctx::set_current(context.cu_ctx()) }
}

impl Drop for Context {
    fn drop(&mut self) {
        // Waiting would break a host's capture off, and its graph needs the kernels: they stay.
        if !self.bind_quietly() || self.is_capturing() {
            return;
        }
        outside_capture(|| {
            // Modules must not go while their kernels run. Errors have nobody to go to.
            // SAFETY: the stream lives as long as `self`.
            let _ = unsafe { result::stream::synchronize(self.cu_stream()) };
            self.kernels.unload();
            self.pool.close();
        });
    }
}
