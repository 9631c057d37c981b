//! Device memory that frees itself.
//!
//! All of it comes from pools of the context's own, in the order of its stream: memory that is dropped is free for what
//! is submitted later, whatever still runs, and neither taking nor giving it back waits for the device. What is small has
//! a pool to itself: among large pieces, those that stay would keep the gaps between them from being used again. While a
//! graph is captured, memory is taken on a second stream that is no part of the capture, so that the graph holds no
//! allocations and the memory is there before its first replay; it stays until the graph is gone.

use super::context::{Context, outside_capture};
use crate::engine::lock;
use crate::error::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdeviceptr, CUresult};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// Sizes are multiples of it, so that kernels may read whole vectors at the end.
const GRAIN: u64 = 256;
/// Smaller pieces than this are small.
const LARGE: usize = 1 << 20;
/// A pool keeps free memory up to this part of the device's: what it gives back is mapped anew for the next call, which
/// took a fifth of the time of 4M tokens' gradients with a sixteenth of an H200.
const KEPT_PART: u64 = 4;

/// Where a context's memory comes from.
#[derive(Debug)]
pub(super) struct Pool {
    /// Of large pieces, and of small ones.
    pools: [sys::CUmemoryPool; 2],
    /// The stream of allocations during captures.
    aside: sys::CUstream,
    /// Memory that graphs of the host may refer to: kept until the context ends.
    retired: Mutex<Vec<CUdeviceptr>>,
    /// Memory dropped during a capture: freed after it.
    deferred: Mutex<Vec<CUdeviceptr>>,
    /// Pieces that a test lets be taken before one is refused.
    #[cfg(test)]
    pub(super) left: std::sync::atomic::AtomicU64,
}

// SAFETY: pools and streams are handles that the driver lets any thread use.
unsafe impl Send for Pool {}
// SAFETY: as above.
unsafe impl Sync for Pool {}

impl Pool {
    /// Of a device with `memory` bytes, whose context is current.
    pub fn new(ordinal: usize, memory: u64) -> Result<Self, DriverError> {
        // SAFETY: a struct of numbers and a pointer that may be null; zero is "none" in each of its enums.
        let mut props: sys::CUmemPoolProps = unsafe { std::mem::zeroed() };
        props.allocType = sys::CUmemAllocationType::CU_MEM_ALLOCATION_TYPE_PINNED;
        props.location.type_ = sys::CUmemLocationType::CU_MEM_LOCATION_TYPE_DEVICE;
        // The number follows the type in every version of the struct, as a field or as part of a union.
        let place = (&raw mut props.location).cast::<i32>();
        // SAFETY: the location is two integers.
        unsafe { place.add(1).write(ordinal as i32) };
        let create = || {
            // SAFETY: the properties are set; the driver copies them.
            let pool = unsafe { result::mem_pool::create(&raw const props) }?;
            let mut kept = memory / KEPT_PART;
            let threshold = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
            // SAFETY: the pool was made above, and the attribute is a 64-bit number.
            unsafe { result::mem_pool::set_attribute(pool, threshold, (&raw mut kept).cast()) }?;
            Ok::<_, DriverError>(pool)
        };
        let pools = [create()?, create()?];
        let aside = result::stream::create(result::stream::StreamKind::NonBlocking)?;
        Ok(Self {
            pools,
            aside,
            retired: Mutex::default(),
            deferred: Mutex::default(),
            #[cfg(test)]
            left: u64::MAX.into(),
        })
    }

    /// Where `size` bytes are taken from.
    fn of(&self, size: usize) -> sys::CUmemoryPool {
        let [large, small] = self.pools;
        if size < LARGE { small } else { large }
    }

    /// Whether a test refuses memory now.
    #[cfg(test)]
    fn refuses(&self) -> bool {
        let counted = |left: u64| (left < u64::MAX).then(|| left.saturating_sub(1));
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, counted) == Ok(0)
    }

    /// Gives everything back; the context is current and its work done.
    pub fn close(&self) {
        for pointer in lock(&self.retired).drain(..).chain(lock(&self.deferred).drain(..)) {
            // SAFETY: memory of this pool, and no work is under way.
            let _ = unsafe { result::free_async(pointer, self.aside) };
        }
        // SAFETY: nothing is taken any more; a pool itself goes once its last memory is back.
        let _ = unsafe { result::stream::destroy(self.aside) };
        for pool in self.pools {
            // SAFETY: as above.
            let _ = unsafe { result::mem_pool::destroy(pool) };
        }
    }
}

#[derive(Debug)]
struct Memory {
    ctx: Arc<Context>,
    pointer: CUdeviceptr,
    bytes: u64,
    /// Whether a graph of the host refers to it.
    captured: AtomicBool,
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.pointer == 0 {
            return;
        }
        if self.captured.load(Ordering::Relaxed) {
            lock(&self.ctx.pool.retired).push(self.pointer);
            return;
        }
        if !self.ctx.bind_quietly() {
            return;
        }
        // A free that is captured would be part of the graph, and one on another stream might overtake work.
        if self.ctx.is_capturing() {
            lock(&self.ctx.pool.deferred).push(self.pointer);
            return;
        }
        // SAFETY: allocated once, freed here, after all submitted work that uses it, in the stream's order.
        let freed = outside_capture(|| unsafe { result::free_async(self.pointer, self.ctx.cu_stream()) });
        if let Err(error) = freed {
            tracing::debug!(error = super::driver::words(error), "device memory is not freed");
        }
    }
}

/// Device memory, shared by those who need it to stay.
#[derive(Clone, Debug)]
pub(crate) struct Buffer(Arc<Memory>);

impl Buffer {
    pub fn pointer(&self) -> CUdeviceptr {
        self.0.pointer
    }

    /// Bytes asked for.
    pub fn size(&self) -> u64 {
        self.0.bytes
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.0.ctx
    }

    /// Keeps the memory for graphs that this crate does not know.
    pub(super) fn retire(&self) {
        self.0.captured.store(true, Ordering::Relaxed);
    }

    /// The bare memory, which the caller frees; `None` where others hold it too.
    pub fn into_pointer(self) -> Option<(CUdeviceptr, u64)> {
        let mut memory = Arc::into_inner(self.0)?;
        if memory.captured.load(Ordering::Relaxed) {
            return None;
        }
        let pointer = std::mem::take(&mut memory.pointer);
        Some((pointer, memory.bytes))
    }

    /// Takes over memory that was allocated in the context's order.
    ///
    /// # Safety
    /// `pointer` is `bytes` of memory of `ctx`'s context that `cuMemFreeAsync` frees, and nobody else does.
    pub unsafe fn from_pointer(ctx: &Arc<Context>, pointer: CUdeviceptr, bytes: u64) -> Self {
        Self(Arc::new(Memory { ctx: ctx.clone(), pointer, bytes, captured: AtomicBool::new(false) }))
    }
}

/// The product of sizes; what no device has where it passes 64 bits.
pub(crate) fn bytes_of(sizes: &[usize]) -> u64 {
    sizes.iter().fold(1, |bytes, &size| u64::saturating_mul(bytes, size as u64))
}

impl Context {
    /// Device memory that holds anything.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], [`Error::DeviceLost`].
    pub fn uninit(self: &Arc<Self>, op: &'static str, bytes: u64) -> Result<Buffer> {
        self.bind(op)?;
        let refused = || Error::OutOfMemory { op, bytes, limit: Some(self.caps().memory) };
        let size = bytes.max(1).checked_next_multiple_of(GRAIN).ok_or_else(refused)?;
        let size = usize::try_from(size).map_err(|_| refused())?;
        let pointer = match self.take(size) {
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) if !self.is_capturing() => {
                // What the pool keeps may be in pieces; what is done by now may come back.
                self.trim(op)?;
                self.take(size)
            }
            other => other,
        };
        match pointer {
            // SAFETY: taken a line above, from the pool that `cuMemFreeAsync` gives it back to.
            Ok(pointer) => Ok(unsafe { Buffer::from_pointer(self, pointer, bytes) }),
            Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY)) => Err(refused()),
            Err(error) => Err(self.error(op, error)),
        }
    }

    fn take(&self, size: usize) -> Result<CUdeviceptr, DriverError> {
        let pool = &self.pool;
        let is_capturing = self.is_capturing();
        let stream = if is_capturing { pool.aside } else { self.cu_stream() };
        #[cfg(test)]
        if pool.refuses() {
            return Err(DriverError(CUresult::CUDA_ERROR_OUT_OF_MEMORY));
        }
        outside_capture(|| {
            if !is_capturing {
                for pointer in lock(&pool.deferred).drain(..) {
                    // SAFETY: dropped during a capture that has ended; nothing submitted later uses it.
                    let _ = unsafe { result::free_async(pointer, stream) };
                }
            }
            // SAFETY: pool and stream live as long as `self`; the memory is given out as holding anything.
            let pointer = unsafe { result::mem_pool::alloc_async(pool.of(size), size, stream) }?;
            if is_capturing {
                // SAFETY: as above. After it the memory is there for every stream.
                unsafe { result::stream::synchronize(stream) }?;
            }
            Ok(pointer)
        })
    }

    /// Device memory of zeros; while a graph is captured, zeros from now on and again at every launch.
    ///
    /// # Errors
    /// As [`Context::uninit`].
    pub fn buffer(self: &Arc<Self>, op: &'static str, bytes: u64) -> Result<Buffer> {
        let buffer = self.uninit(op, bytes)?;
        if self.is_capturing() {
            // Its owner may use it outside of the graph, which may never be launched.
            let (pointer, size) = (buffer.pointer(), buffer.size() as usize);
            // SAFETY: inside the buffer, which nobody else knows yet.
            self.aside(op, |stream| unsafe { result::memset_d8_async(pointer, 0, size, stream) })?;
        }
        self.clear(op, &buffer)?;
        Ok(buffer)
    }

    /// Device memory that holds `data` as soon as the call returns, inside a capture too and no part of it: for what
    /// graphs only read.
    ///
    /// # Errors
    /// As [`Context::uninit`].
    pub fn constant(self: &Arc<Self>, op: &'static str, data: &[u8]) -> Result<Buffer> {
        let buffer = self.uninit(op, data.len() as u64)?;
        if !data.is_empty() {
            let pointer = buffer.pointer();
            // SAFETY: as large as `data`, which outlives the call, and nobody else knows it yet.
            self.aside(op, |stream| unsafe { result::memcpy_htod_async(pointer, data, stream) })?;
        }
        Ok(buffer)
    }

    /// Does something to memory that was just taken while a graph is captured, outside of it, and waits for it.
    fn aside(&self, op: &'static str, act: impl FnOnce(sys::CUstream) -> Result<(), DriverError>) -> Result<()> {
        let stream = self.pool.aside;
        let done = outside_capture(|| {
            act(stream)?;
            // SAFETY: the stream lives as long as `self`.
            unsafe { result::stream::synchronize(stream) }
        });
        self.check(op, done)
    }

    /// Gives the driver back what the pools keep for allocations to come; waits for the device.
    pub fn trim(&self, op: &'static str) -> Result<()> {
        self.settle(op)?;
        for pool in self.pool.pools {
            // SAFETY: the pool lives as long as `self`.
            self.check(op, outside_capture(|| unsafe { result::mem_pool::trim_to(pool, 0) }))?;
        }
        Ok(())
    }

    /// Lets `pieces` of memory be taken, and refuses all after them until it is told otherwise.
    #[cfg(test)]
    pub fn refuse_after(&self, pieces: u64) {
        self.pool.left.store(pieces, Ordering::Relaxed);
    }

    /// Fills with zeros.
    pub fn clear(&self, op: &'static str, buffer: &Buffer) -> Result<()> {
        self.bind(op)?;
        self.pin(buffer);
        // SAFETY: inside the buffer, whose memory is freed only after this, in the stream's order.
        let cleared = unsafe { result::memset_d8_async(buffer.pointer(), 0, buffer.size() as usize, self.cu_stream()) };
        self.check(op, cleared)
    }

    /// Device memory that holds `data`.
    ///
    /// # Errors
    /// As [`Context::uninit`]; [`Error::Unsupported`] while a graph is captured.
    pub fn buffer_with(self: &Arc<Self>, op: &'static str, data: &[u8]) -> Result<Buffer> {
        let buffer = self.uninit(op, data.len() as u64)?;
        self.write(op, &buffer, 0, data)?;
        Ok(buffer)
    }

    /// Writes `data` at `offset`, in the stream's order; `data` may be dropped at once.
    ///
    /// # Errors
    /// [`Error::Limit`] beyond the buffer's end, [`Error::Unsupported`] while a graph is captured: a replay would read
    /// host memory that is gone.
    pub fn write(&self, op: &'static str, buffer: &Buffer, offset: u64, data: &[u8]) -> Result<()> {
        self.bind(op)?;
        let end = offset.saturating_add(data.len() as u64);
        if end > buffer.size() {
            return Err(Error::Limit { op, what: "end of the write in bytes", value: end, limit: buffer.size() });
        }
        if data.is_empty() {
            return Ok(());
        }
        self.refuse_capture(op, "host memory cannot be read (give device memory)")?;
        // SAFETY: inside the buffer; from pageable memory the driver has read everything when the call returns.
        let copy = || unsafe { result::memcpy_htod_async(buffer.pointer() + offset, data, self.cu_stream()) };
        self.check(op, outside_capture(copy))
    }

    /// Copies between buffers, in the stream's order; within one buffer the ranges must not meet.
    ///
    /// # Errors
    /// [`Error::Limit`] beyond either buffer's end.
    pub fn copy(&self, op: &'static str, from: (&Buffer, u64), to: (&Buffer, u64), bytes: u64) -> Result<()> {
        self.bind(op)?;
        for (buffer, offset) in [from, to] {
            let end = offset.saturating_add(bytes);
            if end > buffer.size() {
                return Err(Error::Limit { op, what: "end of the copy in bytes", value: end, limit: buffer.size() });
            }
            self.pin(buffer);
        }
        let (source, target) = (from.0.pointer() + from.1, to.0.pointer() + to.1);
        // SAFETY: inside both buffers, whose memory is freed only after this, in the stream's order.
        let copied = unsafe { result::memcpy_dtod_async(target, source, bytes as usize, self.cu_stream()) };
        self.check(op, copied)
    }
}
