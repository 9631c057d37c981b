//! Reading device memory back.

use super::context::{Context, outside_capture};
use super::memory::Buffer;
use crate::error::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUevent_flags, CUresult};
use std::ffi::c_void;
use std::sync::Arc;

/// Host memory that the device writes to by itself.
struct Pinned {
    ctx: Arc<Context>,
    pointer: *mut c_void,
    bytes: usize,
}

// SAFETY: plain memory that is owned here alone.
unsafe impl Send for Pinned {}

impl Pinned {
    fn new(ctx: &Arc<Context>, op: &'static str, bytes: usize) -> Result<Self> {
        // SAFETY: freed by `Drop`; the context is bound by the caller.
        match outside_capture(|| unsafe { result::malloc_host(bytes, 0) }) {
            Ok(pointer) => Ok(Self { ctx: ctx.clone(), pointer, bytes }),
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(Error::out_of_memory(op, bytes as u64)),
            Err(error) => Err(ctx.error(op, error)),
        }
    }

    /// The content, once the copy into it is done.
    fn to_vec(&self) -> Vec<u8> {
        // SAFETY: as many bytes were allocated and then written by the copy that the caller waited for.
        unsafe { std::slice::from_raw_parts(self.pointer.cast::<u8>(), self.bytes) }.to_vec()
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.ctx.bind_quietly() {
            // SAFETY: allocated once, and the copy into it is over: the driver waits for it.
            let _ = outside_capture(|| unsafe { result::free_host(self.pointer) });
        }
    }
}

/// A point in the stream that a thread waits for.
struct Event(sys::CUevent);

// SAFETY: an event is a handle that the driver lets any thread use.
unsafe impl Send for Event {}

impl Event {
    fn wait(&self, ctx: &Context, op: &'static str) -> Result<()> {
        ctx.bind(op)?;
        // SAFETY: made and recorded by `read_buffer`.
        ctx.check(op, outside_capture(|| unsafe { result::event::synchronize(self.0) }))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: made once, destroyed once.
        let _ = unsafe { result::event::destroy(self.0) };
    }
}

impl Context {
    fn check_read(&self, op: &'static str, buffer: &Buffer, offset: u64, bytes: u64) -> Result<()> {
        self.bind(op)?;
        self.refuse_capture(op, "nothing can be read")?;
        let end = offset.saturating_add(bytes);
        if end > buffer.size() {
            return Err(Error::Limit { op, what: "end of the read in bytes", value: end, limit: buffer.size() });
        }
        Ok(())
    }

    /// Reads a range back, as all work submitted so far leaves it.
    pub async fn read_buffer(
        self: &Arc<Self>,
        op: &'static str,
        buffer: &Buffer,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>> {
        self.check_read(op, buffer, offset, bytes)?;
        if bytes == 0 {
            return Ok(Vec::new());
        }
        let event = Event(self.check(op, result::event::create(CUevent_flags::CU_EVENT_BLOCKING_SYNC))?);
        let pinned = Pinned::new(self, op, bytes as usize)?;
        // SAFETY: both sides have room for as many bytes and outlive the copy: the buffer is freed in the stream's
        // order, the host memory moves to the thread that waits, which runs even where this future is dropped.
        let copied = unsafe {
            sys::cuMemcpyDtoHAsync_v2(pinned.pointer, buffer.pointer() + offset, pinned.bytes, self.cu_stream())
        };
        self.check(op, copied.result())?;
        // SAFETY: event and stream are of this context.
        self.check(op, unsafe { result::event::record(event.0, self.cu_stream()) })?;
        let ctx = self.clone();
        let wait = move || event.wait(&ctx, op).map(|()| pinned.to_vec());
        let message = "the thread that waits ended".to_string();
        self.waiter.run(wait).await.unwrap_or(Err(Error::Gpu { op, message }))
    }

    /// As [`Context::read_buffer`], waiting on the calling thread.
    pub fn read_buffer_blocking(&self, op: &'static str, buffer: &Buffer, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        self.check_read(op, buffer, offset, bytes)?;
        let mut data = crate::engine::cpu::memory::zeros::<u8>(op, bytes as usize)?;
        if data.is_empty() {
            return Ok(data);
        }
        let (copied, waited) = outside_capture(|| {
            // SAFETY: both sides have room for as many bytes, and both live until the stream is waited for below.
            let copied = unsafe { result::memcpy_dtoh_async(&mut data, buffer.pointer() + offset, self.cu_stream()) };
            // SAFETY: the stream lives as long as `self`.
            (copied, unsafe { result::stream::synchronize(self.cu_stream()) })
        });
        self.check(op, copied)?;
        self.check(op, waited)?;
        Ok(data)
    }
}
