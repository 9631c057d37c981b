//! Tensors in CUDA memory.

use super::{DType, Resident, Storage, Tensor, TensorView};
use crate::device::Device;
use crate::engine::cuda::{Buffer, Context};
use crate::error::{Error, Result};
use cudarc::driver::sys::{CUcontext, CUdeviceptr, CUstream};
use cudarc::driver::{CudaSlice, DevicePtr};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

/// Where a view's elements are.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory<'a> {
    pointer: CUdeviceptr,
    bytes: u64,
    context: CUcontext,
    /// The stream in whose order the memory is used, where the caller does not vouch for it.
    stream: Option<CUstream>,
    /// A result of this crate's, which graphs hold.
    buffer: Option<&'a Buffer>,
}

// SAFETY: an address and two handles, which are compared here and not used.
unsafe impl Send for Memory<'_> {}
// SAFETY: as above.
unsafe impl Sync for Memory<'_> {}

impl<'a> Memory<'a> {
    pub fn pointer(&self) -> CUdeviceptr {
        self.pointer
    }

    pub fn context(&self) -> CUcontext {
        self.context
    }

    pub fn stream(&self) -> Option<CUstream> {
        self.stream
    }

    pub fn buffer(&self) -> Option<&'a Buffer> {
        self.buffer
    }

    /// Elements from the view's first on.
    pub(super) fn elements(&self, op: &'static str, tensor: &'static str, view: &TensorView<'_>) -> Result<u64> {
        let size = view.dtype.size() as u64;
        let expected = if self.pointer == 0 && view.extent() > 0 {
            "an address, got null".into()
        } else if !self.pointer.is_multiple_of(size) {
            format!("an address that is a multiple of {size}, got {:#x}", self.pointer)
        } else if self.pointer.checked_add(self.bytes).is_none() {
            format!("{} bytes below the end of the address space, got {:#x}", self.bytes, self.pointer)
        } else {
            return Ok(self.bytes / size);
        };
        Err(Error::Shape { op, tensor, got: view.shape.to_vec(), expected })
    }
}

/// CUDA memory as inputs.
impl<'a> TensorView<'a> {
    /// A view of a `CudaSlice` on the device's own stream ([`Device::as_cuda`]), from `offset` bytes on.
    ///
    /// NaN and infinities in it are read as zero and counted, see [`crate::SocketCache::non_finite_seen`]. Work on it
    /// is submitted, not done, when a call returns; what is submitted to that stream later, its freeing included,
    /// comes after, and work on other streams has to be made to wait. A slice of another stream is refused where it is
    /// used.
    pub fn cuda_slice<T>(slice: &'a CudaSlice<T>, offset: u64, dtype: DType, shape: [usize; 4]) -> Self {
        let stream = slice.stream();
        let (pointer, bytes) = (slice.device_ptr(stream).0, slice.num_bytes() as u64);
        let memory = Memory {
            pointer: pointer.saturating_add(offset),
            bytes: bytes.saturating_sub(offset),
            context: slice.context().cu_ctx(),
            stream: Some(stream.cu_stream()),
            buffer: None,
        };
        Self::new(Storage::Cuda(memory), dtype, shape)
    }

    /// A view of `bytes` of CUDA memory at `pointer`, on the same GPU as `device`; on other devices it is refused where
    /// it is used.
    ///
    /// # Safety
    /// Until the work submitted by the call that takes the view is done, `pointer` must be memory of that GPU of at
    /// least as many bytes, and work on other streams than the device's must not write it. What wrote it before must
    /// come before in the stream's order.
    pub unsafe fn cuda_pointer(
        device: &'a Device,
        pointer: CUdeviceptr,
        bytes: u64,
        dtype: DType,
        shape: [usize; 4],
    ) -> Self {
        let context = device.cuda_context().map_or(std::ptr::null_mut(), |context| context.context().cu_ctx());
        let memory = Memory { pointer, bytes, context, stream: None, buffer: None };
        Self::new(Storage::Cuda(memory), dtype, shape)
    }

    pub(super) fn of_cuda(buffer: &'a Buffer, dtype: DType, shape: [usize; 4]) -> Self {
        let context = buffer.context().context().cu_ctx();
        // Every context has a stream of its own, and the buffer's memory is in that one's order.
        let stream = Some(buffer.context().stream().cu_stream());
        let memory = Memory { pointer: buffer.pointer(), bytes: buffer.size(), context, stream, buffer: Some(buffer) };
        Self::new(Storage::Cuda(memory), dtype, shape)
    }

    pub(crate) fn is_cuda(&self) -> bool {
        matches!(self.storage, Storage::Cuda(_))
    }
}

/// CUDA memory as results.
impl Tensor {
    /// Wraps device memory holding the elements from its first byte on.
    pub(crate) fn cuda(dtype: DType, shape: Vec<usize>, buffer: Buffer) -> Self {
        Self { dtype, shape, resident: Resident::Cuda(buffer) }
    }

    pub(super) fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.size()) as u64
    }

    /// A tensor in a `CudaSlice`, which it takes over; `shape` = `[batch, token, head, channel]`.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] where the slice is not of `device`'s context, [`Error::OutOfBounds`] for one that is too
    /// small.
    pub fn from_cuda_slice<T>(device: &Device, slice: CudaSlice<T>, dtype: DType, shape: [usize; 4]) -> Result<Self> {
        let (op, tensor) = ("tensor", "slice");
        let wrong = |expected| Error::WrongDevice { op, tensor, got: "CUDA memory", expected };
        let context = device.cuda_context().ok_or_else(|| wrong("no CUDA device"))?;
        if !context.is_same(slice.context().cu_ctx()) {
            return Err(wrong("another CUDA device"));
        }
        let needed = shape.iter().fold(1u64, |n, &d| n.saturating_mul(d as u64));
        let bytes = slice.num_bytes() as u64;
        let available = bytes / dtype.size() as u64;
        if needed > available {
            return Err(Error::OutOfBounds { op, tensor, needed, available });
        }
        let stream = slice.stream().clone();
        if stream.cu_stream() != context.stream().cu_stream() {
            context.check(op, context.stream().join(&stream))?;
        }
        // SAFETY: the slice gives up memory of this context that `cuMemFreeAsync` frees, after all that its own stream
        // does with it.
        let buffer = unsafe { Buffer::from_pointer(context, slice.leak(), bytes) };
        Ok(Self::cuda(dtype, shape.to_vec(), buffer))
    }

    /// The memory of the elements; `None` elsewhere than on CUDA.
    pub(crate) fn cuda_buffer(&self) -> Option<&Buffer> {
        match &self.resident {
            Resident::Cuda(buffer) => Some(buffer),
            _ => None,
        }
    }

    /// Address of the elements in CUDA memory; `None` elsewhere. Work that fills them may be under way on the device's
    /// stream.
    pub fn as_cuda(&self) -> Option<CUdeviceptr> {
        match &self.resident {
            Resident::Cuda(buffer) => Some(buffer.pointer()),
            _ => None,
        }
    }

    /// The elements as a `CudaSlice` on the device's stream, which frees them.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] where they are not in CUDA memory; [`Error::Unsupported`] where other tensors or a graph
    /// hold the same memory, or its size is no multiple of `T`'s.
    pub fn into_cuda_slice<T>(self) -> Result<CudaSlice<T>> {
        let (op, bytes) = ("into_cuda_slice", self.bytes());
        let Resident::Cuda(buffer) = self.resident else {
            let (tensor, got, expected) = ("tensor", "elsewhere", "a CUDA device");
            return Err(Error::WrongDevice { op, tensor, got, expected });
        };
        let refused = |why: &str| Error::Unsupported { op, why: why.into() };
        if size_of::<T>() == 0 || !bytes.is_multiple_of(size_of::<T>() as u64) {
            return Err(refused("the memory is no whole number of such elements"));
        }
        let context: Arc<Context> = buffer.context().clone();
        context.check_alive(op)?;
        let pointer = buffer.into_pointer().ok_or_else(|| refused("clones of the tensor, or graphs, hold it too"))?;
        let (pointer, length) = (pointer.0, (bytes / size_of::<T>() as u64) as usize);
        // SAFETY: as many bytes of this context's memory, owned here alone, which `cuMemFreeAsync` frees. The bindings
        // panic where the device is lost meanwhile.
        let slice = catch_unwind(AssertUnwindSafe(|| unsafe { context.stream().upgrade_device_ptr(pointer, length) }));
        slice.map_err(|_| Error::Gpu { op, message: "the driver makes no events".into() })
    }
}
