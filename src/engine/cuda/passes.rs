//! A list of launches that is made ready as a whole, then submitted: whatever can fail fails before anything is in the
//! stream.

use super::context::Context;
use super::memory::Buffer;
use super::module::{Kernel, KernelKey, is_too_large};
use super::timing::Timer;
use crate::error::{Error, Result};
use cudarc::driver::result::DriverError;
use cudarc::driver::sys::{self, CUlaunchAttributeID, CUlaunchConfig};
use std::ffi::c_void;
use std::sync::Arc;

/// Bytes of all arguments of a kernel that every driver takes.
const MOST_ARGUMENTS: usize = 4096;
/// Blocks along x, and along y and z.
const MOST_BLOCKS: [u64; 3] = [(1 << 31) - 1, 65535, 65535];
/// Bytes of one launch of the kernel that writes its arguments.
pub(super) const PART: usize = 3840;

/// A kernel that is timed under a name.
pub(crate) trait Stage: KernelKey {
    fn stage(&self) -> &'static str;
}

/// How a kernel is launched.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    blocks: [u64; 3],
    threads: [u32; 3],
    shared: u32,
    cluster: u32,
    cooperative: bool,
    overlap: bool,
}

impl Grid {
    /// `blocks` blocks along x of `threads` threads.
    pub fn new(blocks: u64, threads: u32) -> Self {
        Self::xyz([blocks, 1, 1], threads)
    }

    /// Blocks along x (up to 2³¹ − 1), y and z (up to 65,535).
    pub fn xyz(blocks: [u64; 3], threads: u32) -> Self {
        Self { blocks, threads: [threads, 1, 1], shared: 0, cluster: 1, cooperative: false, overlap: false }
    }

    /// Bytes of dynamic shared memory, up to [`super::Caps::shared_memory`] with the static.
    pub fn shared(self, bytes: u32) -> Self {
        Self { shared: bytes, ..self }
    }

    #[cfg_attr(not(test), allow(dead_code, reason = "no kernel here wants it yet"))]
    /// Blocks of a cluster along x, which must divide those of the grid.
    pub fn cluster(self, blocks: u32) -> Self {
        Self { cluster: blocks, ..self }
    }

    #[cfg_attr(not(test), allow(dead_code, reason = "no kernel here wants it yet"))]
    /// All blocks run at once and may wait for each other.
    pub fn cooperative(self) -> Self {
        Self { cooperative: true, ..self }
    }

    /// May begin before the launch before it has ended: the kernel executes `griddepcontrol.wait` before it reads what
    /// that one writes (programmatic dependent launch, from 9.0 on; ignored on older GPUs).
    pub fn overlap(self) -> Self {
        Self { overlap: true, ..self }
    }
}

/// A pointer argument, and the memory behind it.
#[derive(Clone, Debug)]
pub(crate) struct Bind {
    pointer: u64,
    memory: Option<Buffer>,
    /// Index of a part given to [`Passes::part`], which `pointer` is an offset in.
    part: Option<usize>,
    /// Whether [`Ready::give`] is still to say where.
    open: bool,
}

impl Bind {
    /// From `offset` bytes on.
    pub fn at(buffer: &Buffer, offset: u64) -> Self {
        Self { pointer: buffer.pointer() + offset, memory: Some(buffer.clone()), part: None, open: false }
    }

    /// Memory that the caller lent for the call.
    pub fn lent(pointer: u64) -> Self {
        Self { pointer, memory: None, part: None, open: false }
    }

    /// What is not there yet when the list is made ready: see [`Ready::give`].
    pub fn open() -> Self {
        Self { open: true, ..Self::null() }
    }

    /// An argument that the kernel does not read.
    pub fn null() -> Self {
        Self::lent(0)
    }
    /// Largest power of two, up to 16, that the address is a multiple of.
    pub fn alignment(&self) -> u64 {
        1 << self.pointer.trailing_zeros().min(4)
    }
}

impl From<&Buffer> for Bind {
    fn from(buffer: &Buffer) -> Self {
        Self::at(buffer, 0)
    }
}

struct Launch {
    kernel: Arc<Kernel>,
    stage: &'static str,
    params: Vec<u8>,
    binds: Vec<Bind>,
    grid: Grid,
}

enum Step {
    Launch(Launch),
    Copy {
        from: Bind,
        to: Bind,
        bytes: u64,
    },
    #[cfg_attr(not(test), allow(dead_code, reason = "no kernel here wants it yet"))]
    Clear {
        at: Bind,
        bytes: u64,
    },
}

/// See the module.
pub(crate) struct Passes<'a> {
    ctx: &'a Arc<Context>,
    op: &'static str,
    parts: Vec<Vec<u8>>,
    steps: Vec<Step>,
}

/// Launches with all that they need.
pub(crate) struct Ready {
    steps: Vec<Step>,
}

impl<'a> Passes<'a> {
    pub fn new(ctx: &'a Arc<Context>, op: &'static str) -> Self {
        Self { ctx, op, parts: Vec::new(), steps: Vec::new() }
    }

    pub fn op(&self) -> &'static str {
        self.op
    }

    /// Small data that this list's launches read. It travels in the arguments of a kernel, so it may be part of a
    /// graph; better, where it fits, is a field of the parameters.
    pub fn part<T: bytemuck::NoUninit>(&mut self, data: &[T]) -> Bind {
        self.parts.push(bytemuck::cast_slice(data).to_vec());
        Bind { part: Some(self.parts.len() - 1), ..Bind::null() }
    }

    /// A copy, after what was added before.
    pub fn copy(&mut self, from: Bind, to: Bind, bytes: u64) {
        self.steps.push(Step::Copy { from, to, bytes });
    }

    /// Zeros, after what was added before.
    #[cfg_attr(not(test), allow(dead_code, reason = "no kernel here wants it yet"))]
    pub fn clear(&mut self, at: Bind, bytes: u64) {
        self.steps.push(Step::Clear { at, bytes });
    }

    /// Adds a launch; none where the grid has no blocks. The kernel's arguments are `params` by value, then a pointer
    /// for each of `binds`.
    ///
    /// # Errors
    /// [`Error::Limit`] for a grid, a block or arguments that no launch takes; what compiling the kernel gives.
    pub fn dispatch(
        &mut self,
        key: impl Stage,
        params: impl bytemuck::NoUninit,
        grid: Grid,
        binds: Vec<Bind>,
    ) -> Result<()> {
        let op = self.op;
        if grid.blocks.contains(&0) {
            return Ok(());
        }
        let kernel = self.ctx.kernel(op, &key)?;
        let within = |what, value: u64, limit: u64| {
            if value <= limit { Ok(()) } else { Err(Error::Limit { op, what, value, limit }) }
        };
        for (value, limit) in grid.blocks.into_iter().zip(MOST_BLOCKS) {
            within("blocks of one launch", value, limit)?;
        }
        within("threads of a block", grid.threads.iter().map(|&n| u64::from(n)).product(), kernel.max_threads.into())?;
        let arguments = size_of_val(&params) + 8 * binds.len();
        within("bytes of a kernel's arguments", arguments as u64, MOST_ARGUMENTS as u64)?;
        kernel.allow_shared(self.ctx, op, grid.shared)?;
        let params = bytemuck::bytes_of(&params).to_vec();
        self.steps.push(Step::Launch(Launch { kernel, stage: key.stage(), params, binds, grid }));
        Ok(())
    }

    /// Sends the parts on their way and settles all addresses.
    pub fn ready(mut self) -> Result<Ready> {
        let (ctx, op) = (self.ctx, self.op);
        ctx.bind(op)?;
        let capturing = ctx.is_capturing();
        let places = self.write_parts(capturing)?;
        let settle = |bind: &mut Bind| {
            if let Some((buffer, offset)) = bind.part.take().and_then(|part| places.get(part)) {
                bind.pointer += buffer.pointer() + offset;
                bind.memory = Some(buffer.clone());
            }
            if let (true, Some(memory)) = (capturing, &bind.memory) {
                ctx.pin_captured(memory);
            }
        };
        for step in &mut self.steps {
            match step {
                Step::Launch(launch) => launch.binds.iter_mut().for_each(settle),
                Step::Copy { from, to, .. } => [from, to].into_iter().for_each(settle),
                Step::Clear { at, .. } => settle(at),
            }
        }
        Ok(Ready { steps: self.steps })
    }

    /// Where each part is.
    fn write_parts(&mut self, capturing: bool) -> Result<Vec<(Buffer, u64)>> {
        let mut image = Vec::new();
        let mut places = Vec::with_capacity(self.parts.len());
        for part in self.parts.drain(..) {
            places.push(image.len() as u64);
            image.extend_from_slice(&part);
            image.resize(image.len().next_multiple_of(16), 0);
        }
        if image.is_empty() {
            return Ok(Vec::new());
        }
        let buffer = self.ctx.uninit(self.op, image.len() as u64)?;
        if capturing || image.len() <= PART {
            let mut writes = Vec::new();
            for (i, words) in image.chunks(PART).enumerate() {
                let mut params = WriteParams { words: [0; PART / 4], count: words.len().div_ceil(4) as u32 };
                bytemuck::cast_slice_mut(&mut params.words)[..words.len()].copy_from_slice(words);
                let kernel = self.ctx.kernel(self.op, &WriteKey)?;
                writes.push(Step::Launch(Launch {
                    kernel,
                    stage: WriteKey.stage(),
                    params: bytemuck::bytes_of(&params).to_vec(),
                    binds: vec![Bind::at(&buffer, (i * PART) as u64)],
                    grid: Grid::new(1, 256),
                }));
            }
            self.steps.splice(0..0, writes);
        } else {
            self.ctx.write(self.op, &buffer, 0, &image)?;
        }
        Ok(places.into_iter().map(|place| (buffer.clone(), place)).collect())
    }
}

/// Twin of `WriteParams` in shaders/cuda/common/write_words.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct WriteParams {
    words: [u32; PART / 4],
    count: u32,
}

/// The kernel that writes its arguments to memory: small data without host memory that a graph would come back to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WriteKey;

impl KernelKey for WriteKey {
    fn label(&self) -> String {
        "write_words".into()
    }

    fn source(&self) -> super::KernelSource {
        super::KernelSource {
            file: "common/write_words.cu",
            text: include_str!("../../../shaders/cuda/common/write_words.cu"),
            headers: &[],
            defines: vec![("WORDS", (PART / 4).to_string())],
            options: &[],
            entry: "write_words",
        }
    }
}

impl Stage for WriteKey {
    fn stage(&self) -> &'static str {
        "write"
    }
}

impl Ready {
    /// Puts `buffer` where [`Bind::open`] stands.
    pub fn give(&mut self, ctx: &Context, buffer: &Buffer) {
        if ctx.is_capturing() {
            ctx.pin_captured(buffer);
        }
        for step in &mut self.steps {
            let Step::Launch(launch) = step else { continue };
            launch.binds.iter_mut().filter(|bind| bind.open).for_each(|bind| *bind = Bind::from(buffer));
        }
    }

    /// Submits everything.
    pub fn run(&self, ctx: &Context, op: &'static str) -> Result<()> {
        self.submit(ctx, op, None)
    }

    /// Stage names, one per launch.
    pub fn stages(&self) -> Vec<&'static str> {
        let stage = |step: &Step| match step {
            Step::Launch(launch) => Some(launch.stage),
            Step::Copy { .. } | Step::Clear { .. } => None,
        };
        self.steps.iter().filter_map(stage).collect()
    }

    /// Submits everything, with a timer each launch in a span of its own.
    pub fn submit(&self, ctx: &Context, op: &'static str, timer: Option<&Timer>) -> Result<()> {
        ctx.bind(op)?;
        let mut span = 0;
        for step in &self.steps {
            match step {
                Step::Launch(launch) => {
                    if let Some(timer) = timer {
                        timer.begin(ctx, span)?;
                    }
                    launch.submit(ctx, op)?;
                    if let Some(timer) = timer {
                        timer.end(ctx, span)?;
                    }
                    span += 1;
                }
                Step::Copy { from, to, bytes } => {
                    // SAFETY: the executor's own addresses, inside memory that `self` holds or the caller lent.
                    let copied = unsafe {
                        let stream = ctx.cu_stream();
                        cudarc::driver::result::memcpy_dtod_async(to.pointer, from.pointer, *bytes as usize, stream)
                    };
                    ctx.check(op, copied)?;
                }
                Step::Clear { at, bytes } => {
                    // SAFETY: as above.
                    let cleared = unsafe {
                        cudarc::driver::result::memset_d8_async(at.pointer, 0, *bytes as usize, ctx.cu_stream())
                    };
                    ctx.check(op, cleared)?;
                }
            }
        }
        Ok(())
    }
}

impl Launch {
    fn submit(&self, ctx: &Context, op: &'static str) -> Result<()> {
        let grid = &self.grid;
        // SAFETY: a struct of numbers and unions of numbers, of which zero is a value.
        let mut attributes: [sys::CUlaunchAttribute; 3] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        if grid.cluster > 1 {
            attributes[count].id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
            let cluster = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x: grid.cluster, y: 1, z: 1 };
            attributes[count].value.clusterDim = cluster;
            count += 1;
        }
        if grid.cooperative {
            attributes[count].id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_COOPERATIVE;
            attributes[count].value.cooperative = 1;
            count += 1;
        }
        if grid.overlap && ctx.caps().clusters {
            attributes[count].id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attributes[count].value.programmaticStreamSerializationAllowed = 1;
            count += 1;
        }
        let [x, y, z] = grid.blocks.map(|blocks| blocks as u32);
        let config = CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: grid.threads[0],
            blockDimY: grid.threads[1],
            blockDimZ: grid.threads[2],
            sharedMemBytes: grid.shared,
            hStream: ctx.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count as u32,
        };
        let pointers: Vec<u64> = self.binds.iter().map(|bind| bind.pointer).collect();
        let mut arguments: Vec<*mut c_void> = Vec::with_capacity(1 + pointers.len());
        if !self.params.is_empty() {
            arguments.push(self.params.as_ptr().cast_mut().cast());
        }
        arguments.extend(pointers.iter().map(|pointer| std::ptr::from_ref(pointer).cast_mut().cast()));
        // SAFETY: the function is loaded; the kernel's arguments are the parameters, whose layout a test compares, and
        // one pointer per binding, all read before the call returns; every address that the kernel forms is bounded by
        // the plan that sized buffers and grid.
        let launched = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                self.kernel.function(),
                arguments.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        launched.result().map_err(|error: DriverError| {
            let label = &self.kernel.label;
            match ctx.error(op, error) {
                Error::Gpu { op, message } if is_too_large(error.0) => {
                    let (registers, shared) = (self.kernel.registers, self.kernel.shared + self.grid.shared);
                    let message = format!("kernel {label} with {registers} registers and {shared} bytes: {message}");
                    Error::Gpu { op, message }
                }
                Error::Gpu { op, message } => Error::Gpu { op, message: format!("kernel {label}: {message}") },
                other => other,
            }
        })
    }
}
