//! Capturing what a step submits, and replaying it.

use super::context::{Context, outside_capture};
use super::memory::Buffer;
use crate::engine::lock;
use crate::error::{Error, Result};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUgraphInstantiate_flags, CUstreamCaptureMode};
use std::sync::{Arc, Mutex};

/// The memory that a capture under way refers to, where this crate captures.
#[derive(Debug, Default)]
pub(super) struct Capture(Mutex<Option<Vec<Buffer>>>);

/// Work of a device that is submitted again as a whole, see [`crate::Device::capture`].
///
/// It holds the memory that it refers to, but for memory that the caller lent.
#[derive(Debug)]
pub struct CudaGraph {
    ctx: Arc<Context>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
    #[allow(dead_code, reason = "held, not read")]
    memory: Vec<Buffer>,
}

// SAFETY: the driver lets any thread use a graph as long as only one does at a time; launches are behind `&mut`.
unsafe impl Send for CudaGraph {}

impl CudaGraph {
    /// Submits the work once more, in the order of the device's stream.
    ///
    /// # Errors
    /// [`Error::DeviceLost`], [`Error::Gpu`].
    pub fn launch(&mut self) -> Result<()> {
        let op = "launch graph";
        self.ctx.bind(op)?;
        // SAFETY: the graph is instantiated, and stream and memory live as long as `self`.
        self.ctx.check(op, unsafe { result::graph::launch(self.exec, self.ctx.cu_stream()) })
    }
}

impl Drop for CudaGraph {
    fn drop(&mut self) {
        if self.ctx.bind_quietly() {
            outside_capture(|| {
                // SAFETY: made once, destroyed once; the driver waits with the resources of launches under way.
                let _ = unsafe { result::graph::exec_destroy(self.exec) };
                // SAFETY: as above.
                let _ = unsafe { result::graph::destroy(self.graph) };
            });
        }
    }
}

impl Context {
    /// Keeps buffers that kernels find by addresses in memory, as [`Context::pin`].
    pub fn pin_all(&self, buffers: &[Buffer]) {
        if self.is_capturing() {
            buffers.iter().for_each(|buffer| self.pin_captured(buffer));
        }
    }

    /// Keeps `buffer` for as long as a capture under way may refer to it.
    pub(super) fn pin(&self, buffer: &Buffer) {
        if self.is_capturing() {
            self.pin_captured(buffer);
        }
    }

    /// As [`Context::pin`], where a capture is known to be under way.
    pub(super) fn pin_captured(&self, buffer: &Buffer) {
        match &mut *lock(&self.capture.0) {
            Some(pinned) => pinned.push(buffer.clone()),
            // The host captures, and its graph is not known here.
            None => buffer.retire(),
        }
    }

    /// Captures what `steps` submits, which runs only when the graph is launched.
    pub fn capture<T>(self: &Arc<Self>, steps: impl FnOnce() -> Result<T>) -> Result<(CudaGraph, T)> {
        let op = "capture";
        self.bind(op)?;
        self.refuse_capture(op, "another capture cannot begin")?;
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives as long as `self`, and the capture ends below.
        self.check(op, unsafe { result::stream::begin_capture(self.cu_stream(), mode) })?;
        *lock(&self.capture.0) = Some(Vec::new());
        let end = End(self);
        let outcome = steps();
        drop(end);
        let memory = lock(&self.capture.0).take().unwrap_or_default();
        self.bind(op)?;
        // SAFETY: the capture that began above.
        let graph = unsafe { result::stream::end_capture(self.cu_stream()) };
        // What the steps say comes first: a broken capture follows from it.
        let value = match (outcome, &graph) {
            (Err(error), Ok(graph)) => {
                // SAFETY: made above and not used.
                let _ = unsafe { result::graph::destroy(*graph) };
                return Err(error);
            }
            (Err(error), Err(_)) => return Err(error),
            (Ok(value), _) => value,
        };
        let graph = self.check(op, graph)?;
        if graph.is_null() {
            return Err(Error::Gpu { op, message: "the capture was broken off".into() });
        }
        // SAFETY: the graph was made above.
        match outside_capture(|| unsafe { result::graph::instantiate(graph, CUgraphInstantiate_flags(0)) }) {
            Ok(exec) => Ok((CudaGraph { ctx: self.clone(), graph, exec, memory }, value)),
            Err(error) => {
                // SAFETY: as above; it is not used any more.
                let _ = unsafe { result::graph::destroy(graph) };
                Err(self.error(op, error))
            }
        }
    }
}

/// Ends a capture whose steps panicked, so that the stream can be used again.
struct End<'a>(&'a Context);

impl Drop for End<'_> {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            return;
        }
        lock(&self.0.capture.0).take();
        // SAFETY: the capture that began before; its graph is not used.
        if let Ok(graph) = unsafe { result::stream::end_capture(self.0.cu_stream()) } {
            // SAFETY: as above.
            let _ = unsafe { result::graph::destroy(graph) };
        }
    }
}
