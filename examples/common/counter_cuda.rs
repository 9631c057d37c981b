//! The counter's tensors made through CUDA, so that nothing crosses the bus.

use super::counter::{Counter, Part};
use softhash::cudarc::driver::{CudaContext, CudaFunction, LaunchConfig, PushKernelArg};
use softhash::cudarc::nvrtc::{CompileOptions, Ptx, compile_ptx_with_opts};
use softhash::{DType, Device, StreamFailure, Tensor};
use std::ops::Range;
use std::sync::Arc;

/// What every kernel over the counter's elements begins with.
pub const ELEMENTS: &str = include_str!("counter.cuh");
const FILL: &str = include_str!("counter.cu");
const THREADS: u32 = 256;
/// A stream holds one segment, has one waiting and one in the making.
const SLOTS: usize = 3;

/// Compiles `text` after [`ELEMENTS`], for any GPU that the library runs on.
pub fn compile(counter: &Counter, text: &str, defines: &[(&str, usize)]) -> Result<Ptx, StreamFailure> {
    let own =
        [("HEADS", counter.heads), ("CHANNELS", counter.channels), ("BF16", usize::from(counter.dtype == DType::Bf16))];
    let define = |(name, value): &(&str, usize)| format!("-D{name}={value}");
    let mut options: Vec<String> = own.iter().chain(defines).map(define).collect();
    options.push("--gpu-architecture=compute_80".into());
    let options = CompileOptions { options, ..Default::default() };
    Ok(compile_ptx_with_opts(format!("{ELEMENTS}{text}"), options)?)
}

/// Channels that a thread makes: at most eight, which bf16 stores at once.
fn width(channels: usize) -> usize {
    1 << channels.trailing_zeros().min(3)
}

/// The text of [`Generator`]'s kernel, compiled.
pub fn fill(counter: &Counter) -> Result<Ptx, StreamFailure> {
    compile(counter, FILL, &[("WIDTH", width(counter.channels))])
}

/// Makes tensors in memory that it uses again: a tensor is good until work that reads it is submitted and the same part
/// was made [`SLOTS`] times more.
pub struct Generator {
    device: Device,
    counter: Counter,
    kernel: CudaFunction,
    slots: [Vec<Tensor>; 4],
    made: [usize; 4],
}

impl Generator {
    /// `None` where the device is not CUDA.
    pub fn new(device: &Device, counter: Counter) -> Result<Option<Self>, StreamFailure> {
        let Some((context, _)) = device.as_cuda() else { return Ok(None) };
        let context: &Arc<CudaContext> = context;
        let kernel = context.load_module(fill(&counter)?)?.load_function("fill")?;
        Ok(Some(Self { device: device.clone(), counter, kernel, slots: Default::default(), made: [0; 4] }))
    }

    /// One of the same tensors with memory of its own.
    pub fn another(&self) -> Self {
        let Self { device, counter, kernel, .. } = self;
        let (device, kernel) = (device.clone(), kernel.clone());
        Self { device, counter: *counter, kernel, slots: Default::default(), made: [0; 4] }
    }

    /// Bytes of all tensors.
    pub fn bytes(&self) -> u64 {
        let bytes = |tensor: &Tensor| (tensor.shape().iter().product::<usize>() * tensor.dtype().size()) as u64;
        self.slots.iter().flatten().map(bytes).sum()
    }

    /// `[1, token, heads, channels]` on the device, once its stream is there.
    pub fn tensor(&mut self, part: Part, tokens: Range<u64>) -> Result<Tensor, StreamFailure> {
        let Counter { heads, channels, dtype, .. } = self.counter;
        let shape = [1, (tokens.end - tokens.start) as usize, heads, channels];
        let turn = self.made[part as usize] % SLOTS;
        self.made[part as usize] += 1;
        let (_, stream) = self.device.as_cuda().ok_or("the device is not CUDA")?;
        let elements = shape.iter().product::<usize>();
        let slots = &mut self.slots[part as usize];
        if slots.get(turn).is_none_or(|slot| slot.shape() != shape) {
            // SAFETY: filled below, before anybody reads it.
            let memory = unsafe { stream.alloc::<u8>(elements * dtype.size()) }?;
            let tensor = Tensor::from_cuda_slice(&self.device, memory, dtype, shape)?;
            if turn < slots.len() {
                slots[turn] = tensor;
            } else {
                slots.push(tensor);
            }
        }
        let tensor = slots.get(turn).ok_or("slots are made in turn")?.clone();
        let pointer = tensor.as_cuda().ok_or("the device is not CUDA")?;
        let [base, first, _, _, period, scale, _] = self.counter.shader_words(part, tokens.start);
        let (scale, rows) = (f32::from_bits(scale), u32::try_from(shape[1] * heads)?);
        let threads = u32::try_from(elements / width(channels))?;
        let mut launch = stream.launch_builder(&self.kernel);
        launch.arg(&base).arg(&first).arg(&period).arg(&scale).arg(&rows).arg(&pointer);
        let grid = (threads.div_ceil(THREADS), 1, 1);
        let config = LaunchConfig { grid_dim: grid, block_dim: (THREADS, 1, 1), shared_mem_bytes: 0 };
        // SAFETY: the arguments are the kernel's, and it writes `rows` rows, which is what the tensor holds. Whoever
        // reads the tensor submitted that work to the same stream before.
        unsafe { launch.launch(config) }?;
        Ok(tensor)
    }
}
