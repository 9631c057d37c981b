//! Tensors: borrowed views over host slices or device buffers going in, device-resident results coming out.
//!
//! Layout is NHD, `[batch, token, head, channel]`, row-major unless strides are given.

pub(crate) mod convert;
#[cfg(feature = "cuda")]
mod cuda;

use crate::error::{Error, Result};
use half::{bf16, f16};
#[cfg(any(feature = "wgpu", feature = "cuda"))]
use std::borrow::Cow;
use std::ops::Range;

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum DType {
    /// IEEE 754 single precision.
    F32,
    /// IEEE 754 half precision.
    F16,
    /// bfloat16, the upper half of an `F32`.
    Bf16,
    /// Signed 32-bit integers: indices in results, never an input of attention.
    I32,
}

impl DType {
    /// Bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::F16 | Self::Bf16 => 2,
        }
    }

    /// Whether attention accepts it for q, k, v and o.
    pub const fn is_float(self) -> bool {
        !matches!(self, Self::I32)
    }
}

/// Where the elements of a [`TensorView`] are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Storage<'a> {
    F32(&'a [f32]),
    F16(&'a [f16]),
    Bf16(&'a [bf16]),
    #[cfg(feature = "wgpu")]
    Buffer {
        buffer: &'a wgpu::Buffer,
        offset: u64,
    },
    #[cfg(feature = "cuda")]
    Cuda(cuda::Memory<'a>),
}

/// A borrowed `[batch, token, head, channel]` tensor: a host slice, or a range of a GPU's memory.
#[derive(Clone, Copy, Debug)]
pub struct TensorView<'a> {
    storage: Storage<'a>,
    dtype: DType,
    shape: [usize; 4],
    strides: [usize; 4],
}

fn row_major(shape: [usize; 4]) -> [usize; 4] {
    let [_, t, h, d] = shape;
    [t.saturating_mul(h).saturating_mul(d), h.saturating_mul(d), d, 1]
}

impl<'a> TensorView<'a> {
    fn new(storage: Storage<'a>, dtype: DType, shape: [usize; 4]) -> Self {
        Self { storage, dtype, shape, strides: row_major(shape) }
    }

    /// A view of `data` as `shape` = `[batch, token, head, channel]`. Sizes are checked where the view is used.
    pub fn f32(data: &'a [f32], shape: [usize; 4]) -> Self {
        Self::new(Storage::F32(data), DType::F32, shape)
    }

    /// As [`TensorView::f32`] for half precision.
    pub fn f16(data: &'a [f16], shape: [usize; 4]) -> Self {
        Self::new(Storage::F16(data), DType::F16, shape)
    }

    /// As [`TensorView::f32`] for bfloat16.
    pub fn bf16(data: &'a [bf16], shape: [usize; 4]) -> Self {
        Self::new(Storage::Bf16(data), DType::Bf16, shape)
    }

    /// A view of a GPU buffer that was created with `STORAGE` usage on the device the operation runs on.
    ///
    /// `offset` is in bytes and must be a multiple of the element size. NaN and infinities in it are read as zero
    /// and counted, see [`crate::SocketCache::non_finite_seen`].
    #[cfg(feature = "wgpu")]
    pub fn buffer(buffer: &'a wgpu::Buffer, offset: u64, dtype: DType, shape: [usize; 4]) -> Self {
        Self::new(Storage::Buffer { buffer, offset }, dtype, shape)
    }

    /// Replaces the row-major strides; in elements. The channel stride must be 1.
    #[must_use]
    pub fn with_strides(mut self, strides: [usize; 4]) -> Self {
        self.strides = strides;
        self
    }

    /// A range of tokens of a view of host memory, packed into a tensor of its own.
    // Without a GPU path no view can be elsewhere, and there is nothing to name.
    #[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(unused_variables))]
    pub(crate) fn copy_tokens(&self, op: &'static str, name: &'static str, tokens: Range<usize>) -> Result<Tensor> {
        let [batch, _, heads, channels] = self.shape;
        let shape = [batch, tokens.len(), heads, channels];
        match self.storage {
            Storage::F32(data) => Tensor::from_f32(self.pack(data, 0..batch, tokens), shape),
            Storage::F16(data) => Tensor::from_f16(self.pack(data, 0..batch, tokens), shape),
            Storage::Bf16(data) => Tensor::from_bf16(self.pack(data, 0..batch, tokens), shape),
            #[cfg(feature = "wgpu")]
            Storage::Buffer { .. } => Err(convert::on_gpu(op, name)),
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) => Err(convert::on_gpu(op, name)),
        }
    }

    /// Rows `batch` and tokens `tokens`, without gaps.
    fn pack<T: Copy>(&self, data: &[T], batch: Range<usize>, tokens: Range<usize>) -> Vec<T> {
        let [_, _, heads, channels] = self.shape;
        let mut packed = Vec::with_capacity(batch.len() * tokens.len() * heads * channels);
        for b in batch {
            for t in tokens.clone() {
                for h in 0..heads {
                    let at = self.row_offset(b, t, h);
                    packed.extend_from_slice(&data[at..at + channels]);
                }
            }
        }
        packed
    }

    /// The bytes of rows `batch` and tokens `tokens` without gaps, copied only where there are some; `None` where they
    /// are not in host memory.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub(crate) fn host_bytes(&self, batch: Range<usize>, tokens: Range<usize>) -> Option<Cow<'a, [u8]>> {
        let [all_rows, all_tokens, ..] = self.shape;
        let whole = batch == (0..all_rows) && tokens == (0..all_tokens) && self.is_contiguous();
        let length = self.extent() as usize;
        macro_rules! bytes {
            ($data:ident) => {
                match whole {
                    true => Cow::Borrowed(bytemuck::cast_slice(&$data[..length])),
                    false => Cow::Owned(bytemuck::pod_collect_to_vec(&self.pack($data, batch, tokens))),
                }
            };
        }
        match self.storage {
            Storage::F32(data) => Some(bytes!(data)),
            Storage::F16(data) => Some(bytes!(data)),
            Storage::Bf16(data) => Some(bytes!(data)),
            #[cfg(feature = "wgpu")]
            Storage::Buffer { .. } => None,
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) => None,
        }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// `[batch, token, head, channel]`.
    pub fn shape(&self) -> [usize; 4] {
        self.shape
    }

    /// Strides in elements.
    pub fn strides(&self) -> [usize; 4] {
        self.strides
    }

    pub(crate) fn storage(&self) -> Storage<'a> {
        self.storage
    }

    /// The same storage and strides under another shape.
    #[cfg(feature = "wgpu")]
    pub(crate) fn with_shape(mut self, shape: [usize; 4]) -> Self {
        self.shape = shape;
        self
    }

    #[cfg(feature = "wgpu")]
    pub(crate) fn is_buffer(&self) -> bool {
        matches!(self.storage, Storage::Buffer { .. })
    }

    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub(crate) fn is_contiguous(&self) -> bool {
        self.strides == row_major(self.shape)
    }

    /// Elements of storage that shape and strides reach, counted from the view's start.
    pub(crate) fn extent(&self) -> u64 {
        if self.shape.contains(&0) {
            return 0;
        }
        self.shape
            .iter()
            .zip(self.strides)
            .map(|(&n, s)| (n as u64 - 1).saturating_mul(s as u64))
            .fold(1, u64::saturating_add)
    }

    /// Element offset of `[batch, token, head, 0]`.
    pub(crate) fn row_offset(&self, b: usize, t: usize, h: usize) -> usize {
        b * self.strides[0] + t * self.strides[1] + h * self.strides[2]
    }

    /// Checks dtype, shape, strides and storage size; and, for host slices, that every element is finite.
    pub(crate) fn check(&self, op: &'static str, tensor: &'static str, expected: [Option<usize>; 4]) -> Result<()> {
        self.check_layout(op, tensor, expected)?;
        self.check_finite(op, tensor)
    }

    /// As [`TensorView::check`], leaving the elements unread.
    pub(crate) fn check_layout(
        &self,
        op: &'static str,
        tensor: &'static str,
        expected: [Option<usize>; 4],
    ) -> Result<()> {
        if !self.dtype.is_float() {
            let expected = "F32, F16 or Bf16".into();
            return Err(Error::DType { op, tensor, got: self.dtype, expected });
        }
        if self.shape.iter().zip(expected).any(|(&n, e)| e.is_some_and(|e| e != n)) {
            let words: Vec<_> = expected.iter().map(|e| e.map_or("any".into(), |n| n.to_string())).collect();
            let expected = format!("[{}]", words.join(", "));
            return Err(Error::Shape { op, tensor, got: self.shape.to_vec(), expected });
        }
        // Strides of 0 let a small slice stand for any number of tokens; walking them all must end.
        let (value, limit) = (self.shape[1] as u64, 1 << 30);
        if value > limit {
            return Err(Error::Limit { op, what: "tokens of a tensor", value, limit });
        }
        if self.strides[3] != 1 {
            let expected = format!("a channel stride of 1, got strides {:?}", self.strides);
            return Err(Error::Shape { op, tensor, got: self.shape.to_vec(), expected });
        }
        let available = match self.storage {
            Storage::F32(s) => s.len() as u64,
            Storage::F16(s) => s.len() as u64,
            Storage::Bf16(s) => s.len() as u64,
            #[cfg(feature = "wgpu")]
            Storage::Buffer { buffer, offset } => {
                let size = self.dtype.size() as u64;
                if !offset.is_multiple_of(size) {
                    let expected = format!("a byte offset that is a multiple of {size}, got {offset}");
                    return Err(Error::Shape { op, tensor, got: self.shape.to_vec(), expected });
                }
                buffer.size().saturating_sub(offset) / size
            }
            #[cfg(feature = "cuda")]
            Storage::Cuda(memory) => memory.elements(op, tensor, self)?,
        };
        if self.extent() > available {
            return Err(Error::OutOfBounds { op, tensor, needed: self.extent(), available });
        }
        Ok(())
    }

    fn check_finite(&self, op: &'static str, tensor: &'static str) -> Result<()> {
        // Generic over the test: one called by pointer is not vectorised.
        fn first_bad<T: Copy + Sync>(
            view: &TensorView<'_>,
            data: &[T],
            finite: impl Fn(T) -> bool + Sync,
        ) -> Option<[usize; 4]> {
            use rayon::prelude::*;
            let [batch, tokens, heads, channels] = view.shape;
            let row_of = |i: usize| [i / heads / tokens, i / heads % tokens, i % heads];
            let is_bad = |i: usize| {
                let [b, t, h] = row_of(i);
                let at = view.row_offset(b, t, h);
                // The whole row without a branch, for the compiler to vectorise.
                !data[at..at + channels].iter().fold(true, |all, &x| all & finite(x))
            };
            let rows = batch * tokens * heads;
            // A decode step's rows are not worth waking threads for.
            let row = if rows * channels < 1 << 18 {
                (0..rows).find(|&i| is_bad(i))
            } else {
                (0..rows).into_par_iter().find_first(|&i| is_bad(i))
            }?;
            let [b, t, h] = row_of(row);
            let at = view.row_offset(b, t, h);
            let channel = data[at..at + channels].iter().position(|&x| !finite(x)).unwrap_or(0);
            Some([b, t, h, channel])
        }
        if self.shape.contains(&0) {
            return Ok(());
        }
        let bad = match self.storage {
            Storage::F32(data) => first_bad(self, data, f32::is_finite),
            Storage::F16(data) => first_bad(self, data, f16::is_finite),
            Storage::Bf16(data) => first_bad(self, data, bf16::is_finite),
            #[cfg(feature = "wgpu")]
            Storage::Buffer { .. } => None,
            #[cfg(feature = "cuda")]
            Storage::Cuda(_) => None,
        };
        bad.map_or(Ok(()), |index| Err(Error::NonFinite { op, tensor, index }))
    }
}

/// Elements in the memory of their own type, so that they can be seen as numbers and as bytes without a copy.
#[derive(Clone, Debug, PartialEq)]
enum HostData {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
    I32(Vec<i32>),
}

/// Elements read back to the host.
#[derive(Clone, Debug, PartialEq)]
pub struct HostTensor {
    dtype: DType,
    shape: Vec<usize>,
    data: HostData,
}

impl HostTensor {
    /// Wraps `bytes` (little endian, row-major) as `shape` of `dtype`.
    pub(crate) fn new(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Self {
        debug_assert_eq!(bytes.len(), shape.iter().product::<usize>() * dtype.size());
        let data = match dtype {
            DType::F32 => HostData::F32(bytemuck::pod_collect_to_vec(&bytes)),
            DType::F16 => HostData::F16(bytemuck::pod_collect_to_vec(&bytes)),
            DType::Bf16 => HostData::Bf16(bytemuck::pod_collect_to_vec(&bytes)),
            DType::I32 => HostData::I32(bytemuck::pod_collect_to_vec(&bytes)),
        };
        Self { dtype, shape, data }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, row-major.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The elements as little-endian bytes.
    pub fn bytes(&self) -> &[u8] {
        match &self.data {
            HostData::F32(data) => bytemuck::cast_slice(data),
            HostData::F16(data) => bytemuck::cast_slice(data),
            HostData::Bf16(data) => bytemuck::cast_slice(data),
            HostData::I32(data) => bytemuck::cast_slice(data),
        }
    }

    /// The elements widened (or converted, for `I32`) to f32.
    pub fn to_f32(&self) -> Vec<f32> {
        match &self.data {
            HostData::F32(data) => data.clone(),
            HostData::F16(data) => data.iter().map(|x| x.to_f32()).collect(),
            HostData::Bf16(data) => data.iter().map(|x| x.to_f32()).collect(),
            HostData::I32(data) => data.iter().map(|&x| x as f32).collect(),
        }
    }

    /// The elements as integers; floats are truncated.
    pub fn to_i32(&self) -> Vec<i32> {
        match &self.data {
            HostData::I32(data) => data.clone(),
            _ => self.to_f32().into_iter().map(|x| x as i32).collect(),
        }
    }
}

#[derive(Clone, Debug)]
pub(crate) enum Resident {
    Host(HostTensor),
    #[cfg(feature = "wgpu")]
    Gpu {
        context: std::sync::Arc<crate::engine::gpu::Context>,
        buffer: wgpu::Buffer,
        bytes: u64,
    },
    #[cfg(feature = "cuda")]
    Cuda(crate::engine::cuda::Buffer),
}

/// A result. It stays where it was computed until it is read.
#[derive(Clone, Debug)]
pub struct Tensor {
    dtype: DType,
    shape: Vec<usize>,
    resident: Resident,
}

/// `[batch, token, head, channel]` with as many elements as there are.
fn check_count(shape: [usize; 4], count: usize) -> Result<()> {
    let wanted = shape.iter().try_fold(1usize, |n, &d| n.checked_mul(d));
    if wanted == Some(count) {
        return Ok(());
    }
    let expected = format!("a product of {count}, the number of elements");
    Err(Error::Shape { op: "tensor", tensor: "shape", got: shape.to_vec(), expected })
}

/// Tensors of the caller's making, for segments of a stream.
impl Tensor {
    fn of_host(dtype: DType, shape: [usize; 4], count: usize, data: HostData) -> Result<Self> {
        check_count(shape, count)?;
        let shape = shape.to_vec();
        Ok(Self { dtype, shape: shape.clone(), resident: Resident::Host(HostTensor { dtype, shape, data }) })
    }

    /// A tensor in host memory, `shape` = `[batch, token, head, channel]`; nothing is copied.
    ///
    /// # Errors
    /// [`Error::Shape`] where the number of elements is another.
    pub fn from_f32(data: Vec<f32>, shape: [usize; 4]) -> Result<Self> {
        Self::of_host(DType::F32, shape, data.len(), HostData::F32(data))
    }

    /// As [`Tensor::from_f32`] for half precision.
    ///
    /// # Errors
    /// As [`Tensor::from_f32`].
    pub fn from_f16(data: Vec<f16>, shape: [usize; 4]) -> Result<Self> {
        Self::of_host(DType::F16, shape, data.len(), HostData::F16(data))
    }

    /// As [`Tensor::from_f32`] for bfloat16.
    ///
    /// # Errors
    /// As [`Tensor::from_f32`].
    pub fn from_bf16(data: Vec<bf16>, shape: [usize; 4]) -> Result<Self> {
        Self::of_host(DType::Bf16, shape, data.len(), HostData::Bf16(data))
    }

    /// A tensor in a buffer of `device`'s, from its first byte on; `shape` = `[batch, token, head, channel]`. The
    /// buffer needs `STORAGE` usage to be an input and `COPY_SRC` to be read.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] on the CPU path, [`Error::OutOfBounds`] for a buffer that is too small.
    #[cfg(feature = "wgpu")]
    pub fn from_buffer(device: &crate::Device, buffer: wgpu::Buffer, dtype: DType, shape: [usize; 4]) -> Result<Self> {
        let op = "tensor";
        let wrong = Error::WrongDevice { op, tensor: "buffer", got: "a GPU buffer", expected: "the CPU" };
        let context = device.context().ok_or(wrong)?.clone();
        let needed = shape.iter().fold(1u64, |n, &d| n.saturating_mul(d as u64));
        let available = buffer.size() / dtype.size() as u64;
        if needed > available {
            return Err(Error::OutOfBounds { op, tensor: "buffer", needed, available });
        }
        Ok(Self::gpu(context, dtype, shape.to_vec(), buffer))
    }
}

impl Tensor {
    pub(crate) fn host(dtype: DType, shape: Vec<usize>, bytes: Vec<u8>) -> Self {
        let host = HostTensor::new(dtype, shape.clone(), bytes);
        Self { dtype, shape, resident: Resident::Host(host) }
    }

    /// Wraps a device buffer holding the elements from its first byte on.
    #[cfg(feature = "wgpu")]
    pub(crate) fn gpu(
        context: std::sync::Arc<crate::engine::gpu::Context>,
        dtype: DType,
        shape: Vec<usize>,
        buffer: wgpu::Buffer,
    ) -> Self {
        let bytes = (shape.iter().product::<usize>() * dtype.size()) as u64;
        Self { dtype, shape, resident: Resident::Gpu { context, buffer, bytes } }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Shape, row-major.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// The GPU buffer that holds the elements from its first byte on; `None` on the CPU path.
    #[cfg(feature = "wgpu")]
    pub fn as_buffer(&self) -> Option<&wgpu::Buffer> {
        match &self.resident {
            Resident::Gpu { buffer, .. } => Some(buffer),
            _ => None,
        }
    }

    /// Copies the elements to the host. On a GPU the commands that produce them must have been submitted.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] where the device went away meanwhile.
    pub async fn read(&self) -> Result<HostTensor> {
        match &self.resident {
            Resident::Host(host) => Ok(host.clone()),
            #[cfg(feature = "wgpu")]
            Resident::Gpu { context, buffer, bytes } => {
                let data = context.read_buffer("read", buffer, 0, *bytes).await?;
                Ok(HostTensor::new(self.dtype, self.shape.clone(), data))
            }
            #[cfg(feature = "cuda")]
            Resident::Cuda(buffer) => {
                let data = buffer.context().read_buffer("read", buffer, 0, self.bytes()).await?;
                Ok(HostTensor::new(self.dtype, self.shape.clone(), data))
            }
        }
    }

    /// As [`Tensor::read`], waiting for it. Not available in browsers, which cannot wait.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn read_blocking(&self) -> Result<HostTensor> {
        match &self.resident {
            Resident::Host(host) => Ok(host.clone()),
            #[cfg(feature = "wgpu")]
            Resident::Gpu { context, buffer, bytes } => {
                let data = context.read_buffer_blocking("read", buffer, 0, *bytes)?;
                Ok(HostTensor::new(self.dtype, self.shape.clone(), data))
            }
            #[cfg(feature = "cuda")]
            Resident::Cuda(buffer) => {
                let data = buffer.context().read_buffer_blocking("read", buffer, 0, self.bytes())?;
                Ok(HostTensor::new(self.dtype, self.shape.clone(), data))
            }
        }
    }

    /// A view for use as an input, with trailing dimensions of 1 up to four; `None` where the dtype is not a float.
    pub fn view(&self) -> Option<TensorView<'_>> {
        let mut shape = [1; 4];
        shape.get_mut(..self.shape.len())?.copy_from_slice(&self.shape);
        match &self.resident {
            Resident::Host(host) => match &host.data {
                HostData::F32(data) => Some(TensorView::f32(data, shape)),
                HostData::F16(data) => Some(TensorView::f16(data, shape)),
                HostData::Bf16(data) => Some(TensorView::bf16(data, shape)),
                HostData::I32(_) => None,
            },
            #[cfg(feature = "wgpu")]
            Resident::Gpu { buffer, .. } => {
                self.dtype.is_float().then(|| TensorView::buffer(buffer, 0, self.dtype, shape))
            }
            #[cfg(feature = "cuda")]
            Resident::Cuda(buffer) => self.dtype.is_float().then(|| TensorView::of_cuda(buffer, self.dtype, shape)),
        }
    }
}
