//! The context: a device, its queue, what was found out about them, and calls that return errors instead of raising
//! them at the host.

use super::arena::Arena;
use super::caps::{Caps, verify};
use super::pipeline::{self, KernelKey, Pipeline, Pipelines};
use super::readback::Readback;
use super::results::Results;
use super::trace::Trace;
use crate::engine::lost::Lost;
use crate::error::{Error, Result};
use futures::FutureExt;
use std::sync::Arc;

/// What a context is made of.
pub(crate) struct Setup {
    pub info: wgpu::AdapterInfo,
    pub device: wgpu::Device,
    pub queue: wgpu::Queue,
    /// Whether a host owns the device: its error handlers stay untouched.
    pub lent: bool,
    /// Whether shaders run without run-time checks.
    pub unchecked: bool,
    /// What [`Context::pipeline_cache_data`] returned earlier.
    pub pipeline_cache: Option<Vec<u8>>,
}

/// A device, its queue and what was found out about them.
#[derive(Debug)]
pub(crate) struct Context {
    /// Dropped first: its thread must end before the device does.
    readback: Readback,
    device: wgpu::Device,
    queue: wgpu::Queue,
    info: wgpu::AdapterInfo,
    caps: Caps,
    lost: Arc<Lost>,
    arena: Arena,
    pipelines: Pipelines,
    results: Results,
    trace: Trace,
}

impl Context {
    pub fn new(setup: Setup) -> Result<Arc<Self>> {
        let Setup { info, device, queue, lent, unchecked, pipeline_cache } = setup;
        verify(&device.limits())?;
        let lost = Arc::new(Lost::default());
        if !lent {
            let seen = lost.clone();
            device.set_device_lost_callback(move |reason, message| {
                let text = if message.is_empty() { format!("{reason:?}") } else { message };
                seen.set(text);
            });
            // wgpu panics on errors that nobody takes; ours are all taken, a caller's own mistakes are logged.
            device.on_uncaptured_error(Arc::new(|error| tracing::error!("wgpu: {error}")));
        }
        let caps = Caps::new(&info, &device, &queue, unchecked);
        let pipelines = Pipelines::new(&device, &caps, pipeline_cache.as_deref())?;
        let arena = Arena::new(&caps);
        let readback = Readback::default();
        let (results, trace) = (Results::default(), Trace::default());
        let context = Self { device, queue, info, caps, lost, arena, pipelines, readback, results, trace };
        context.check_alive("device")?;
        Ok(Arc::new(context))
    }

    pub fn device(&self) -> &wgpu::Device {
        &self.device
    }

    pub fn queue(&self) -> &wgpu::Queue {
        &self.queue
    }

    pub fn info(&self) -> &wgpu::AdapterInfo {
        &self.info
    }

    pub fn caps(&self) -> &Caps {
        &self.caps
    }

    pub fn arena(&self) -> &Arena {
        &self.arena
    }

    pub fn results(&self) -> &Results {
        &self.results
    }

    pub fn trace(&self) -> &Trace {
        &self.trace
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn lost(&self) -> &Arc<Lost> {
        &self.lost
    }

    /// [`Error::DeviceLost`] once the device is gone.
    pub fn check_alive(&self, op: &'static str) -> Result<()> {
        self.lost.check(op)?;
        if !self.probe_alive() {
            self.lost.set("destroyed, or given up by the driver".into());
        }
        self.lost.check(op)
    }

    /// Asks the device itself, since wgpu drops errors of a lost device silently and a lent device's callback is not
    /// ours to set: a live device objects to a buffer that is good for nothing, a lost one objects to nothing. Nothing
    /// is made by asking, so any number of threads may.
    #[cfg(not(target_arch = "wasm32"))]
    fn probe_alive(&self) -> bool {
        let usage = wgpu::BufferUsages::empty();
        let nothing =
            wgpu::BufferDescriptor { label: Some("liveness probe"), size: 4, usage, mapped_at_creation: false };
        self.scoped("device", || self.device.create_buffer(&nothing)).is_err()
    }

    /// Browsers answer later; there the lost callback and failing reads tell.
    #[cfg(target_arch = "wasm32")]
    fn probe_alive(&self) -> bool {
        true
    }

    /// Runs `body` inside error scopes, so that what goes wrong in it is returned here and never reaches the handler
    /// of the host. In browsers, where scopes answer late, such errors are dropped.
    pub fn scoped<T>(&self, op: &'static str, body: impl FnOnce() -> T) -> Result<T> {
        scoped(&self.device, op, None, body)
    }

    /// Creates a buffer. Its content is zero.
    ///
    /// # Errors
    /// [`Error::Limit`] where the device's largest buffer is smaller, [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn buffer(&self, op: &'static str, label: &str, bytes: u64, usage: wgpu::BufferUsages) -> Result<wgpu::Buffer> {
        self.create_buffer(op, label, bytes, usage, false)
    }

    /// Creates a buffer that holds `data`, padded with zeros to a multiple of four bytes. The content is in place
    /// without a queue write of its own.
    pub fn buffer_with(
        &self,
        op: &'static str,
        label: &str,
        data: &[u8],
        usage: wgpu::BufferUsages,
    ) -> Result<wgpu::Buffer> {
        let bytes = (data.len() as u64).next_multiple_of(4).max(4);
        let buffer = self.create_buffer(op, label, bytes, usage, true)?;
        self.scoped(op, || {
            let filled = buffer.get_mapped_range_mut(..).map(|mut view| view.slice(..data.len()).copy_from_slice(data));
            if filled.is_ok() {
                buffer.unmap();
            }
            filled
        })?
        .map_err(|error| self.gone_or(op, error.to_string()))?;
        Ok(buffer)
    }

    /// Submits the copying of as much of a buffer as another holds.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub fn copy_whole(&self, op: &'static str, from: &wgpu::Buffer, to: &wgpu::Buffer) -> Result<()> {
        let mut encoder = self.encoder(op);
        encoder.copy_buffer_to_buffer(from, 0, to, 0, to.size().min(from.size()));
        self.submit(op, encoder)
    }

    fn create_buffer(
        &self,
        op: &'static str,
        label: &str,
        bytes: u64,
        usage: wgpu::BufferUsages,
        mapped_at_creation: bool,
    ) -> Result<wgpu::Buffer> {
        self.check_alive(op)?;
        if bytes > self.caps.max_buffer {
            return Err(Error::Limit { op, what: "bytes of one buffer", value: bytes, limit: self.caps.max_buffer });
        }
        let size = bytes.next_multiple_of(4).max(4).min(self.caps.max_buffer);
        let descriptor = wgpu::BufferDescriptor { label: Some(label), size, usage, mapped_at_creation };
        let create = || scoped(&self.device, op, Some(bytes), || self.device.create_buffer(&descriptor));
        match create() {
            Err(Error::OutOfMemory { .. }) if self.results.release() => {
                // What was kept for later results is free once the work that used it is done.
                self.settle(op)?;
                create()
            }
            made => made,
        }
    }

    /// Writes `data` at `offset` before the next submission. Both sizes must be multiples of four bytes.
    pub fn write(&self, op: &'static str, buffer: &wgpu::Buffer, offset: u64, data: &[u8]) -> Result<()> {
        self.check_alive(op)?;
        self.scoped(op, || self.queue.write_buffer(buffer, offset, data))
    }

    /// Creates a bind group.
    pub fn bind_group(
        &self,
        op: &'static str,
        label: &str,
        layout: &wgpu::BindGroupLayout,
        entries: &[wgpu::BindGroupEntry<'_>],
    ) -> Result<wgpu::BindGroup> {
        self.check_alive(op)?;
        let descriptor = wgpu::BindGroupDescriptor { label: Some(label), layout, entries };
        self.scoped(op, || self.device.create_bind_group(&descriptor))
    }

    pub fn encoder(&self, label: &str) -> wgpu::CommandEncoder {
        self.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some(label) })
    }

    /// Finishes and submits; errors made while recording come out here.
    pub fn submit(&self, op: &'static str, encoder: wgpu::CommandEncoder) -> Result<()> {
        self.submit_indexed(op, encoder).map(drop)
    }

    pub(super) fn submit_indexed(
        &self,
        op: &'static str,
        encoder: wgpu::CommandEncoder,
    ) -> Result<wgpu::SubmissionIndex> {
        self.check_alive(op)?;
        let index = self.scoped(op, || self.queue.submit([encoder.finish()]))?;
        // A device lost on the way drops commands without a word.
        self.check_alive(op)?;
        Ok(index)
    }

    /// Waits until all submitted work is done.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn settle(&self, op: &'static str) -> Result<()> {
        self.readback.settle(self, op)
    }

    /// Browsers cannot wait.
    #[cfg(target_arch = "wasm32")]
    pub fn settle(&self, op: &'static str) -> Result<()> {
        self.check_alive(op)
    }

    /// The pipeline of `key`, compiled at its first use; concurrent calls for one key compile once.
    pub fn pipeline(&self, op: &'static str, key: &dyn KernelKey) -> Result<Arc<Pipeline>> {
        self.lost.check(op)?;
        self.pipelines.get(self, op, key)
    }

    /// Compiles all of `keys`, concurrently where there are threads, and waits for them.
    pub fn warm_up(&self, keys: &[Box<dyn KernelKey>]) -> Result<()> {
        self.check_alive("warm_up")?;
        self.pipelines.warm_up(self, keys)
    }

    /// As [`Context::warm_up`], without holding the thread that polls.
    pub async fn warm_up_async(self: Arc<Self>, keys: Vec<Box<dyn KernelKey>>) -> Result<()> {
        self.check_alive("warm_up")?;
        pipeline::compile_all(self, keys).await
    }

    /// The pipelines compiled so far, sorted by label.
    pub fn compiled(&self) -> Vec<Arc<Pipeline>> {
        self.pipelines.compiled()
    }

    /// What a later context takes as [`Setup::pipeline_cache`]; `None` where the backend has no such cache.
    pub fn pipeline_cache_data(&self) -> Option<Vec<u8>> {
        self.pipelines.cache_data()
    }

    /// Reads a range of a buffer back. Commands that fill it must have been submitted.
    pub async fn read_buffer(
        &self,
        op: &'static str,
        buffer: &wgpu::Buffer,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>> {
        self.readback.read(self, op, buffer, offset, bytes).await
    }

    /// As [`Context::read_buffer`], waiting on the calling thread.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn read_buffer_blocking(
        &self,
        op: &'static str,
        buffer: &wgpu::Buffer,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>> {
        self.readback.read_blocking(self, op, buffer, offset, bytes)
    }

    /// The device's loss where it is lost, else the runtime's message.
    pub(super) fn gone_or(&self, op: &'static str, message: String) -> Error {
        match self.check_alive(op) {
            Err(lost) => lost,
            Ok(()) => Error::Gpu { op, message },
        }
    }
}

/// See [`Context::scoped`]; `bytes` are those asked for, where that is known.
pub(super) fn scoped<T>(
    device: &wgpu::Device,
    op: &'static str,
    bytes: Option<u64>,
    body: impl FnOnce() -> T,
) -> Result<T> {
    let memory = device.push_error_scope(wgpu::ErrorFilter::OutOfMemory);
    let internal = device.push_error_scope(wgpu::ErrorFilter::Internal);
    let validation = device.push_error_scope(wgpu::ErrorFilter::Validation);
    let value = body();
    // All three are popped before any is looked at: each pop must see its own scope on top.
    let validation = validation.pop().now_or_never().flatten();
    let internal = internal.pop().now_or_never().flatten();
    let memory = memory.pop().now_or_never().flatten();
    if memory.is_some() {
        return Err(match bytes {
            Some(bytes) => Error::out_of_memory(op, bytes),
            None => Error::Gpu { op, message: "the device is out of memory".into() },
        });
    }
    match validation.or(internal) {
        None => Ok(value),
        Some(error) => Err(Error::Gpu { op, message: error.to_string() }),
    }
}
