//! Choosing what runs the work, and saying what was chosen.

#[cfg(feature = "cuda")]
mod cuda;
mod report;

#[cfg(feature = "cuda")]
pub use report::CudaReport;
pub use report::{AdapterSummary, GpuReport, KernelReport, KernelResources, Report};

#[cfg(feature = "wgpu")]
use crate::engine::gpu::{self, Context, Setup, Timer};
use crate::error::{Error, Result};
use crate::race::config::{Parameters, RaceConfig, RaceShape};
use crate::race::cpu::{CpuRace, CpuWindow};
use crate::race::executor::RaceExecutor;
use crate::race::window::{WindowExecutor, WindowSpec};
use crate::socket::cpu::CpuExecutor;
use crate::socket::executor::Executor;
use crate::socket::problem::CacheSpec;
use std::sync::Arc;

/// Environment variable that names the device [`Device::auto`] takes.
const DEVICE_VARIABLE: &str = "SOFTHASH_DEVICE";
/// Environment variable that turns the shaders' run-time checks on.
#[cfg(feature = "wgpu")]
const CHECKED_VARIABLE: &str = "SOFTHASH_CHECKED";
/// The name of the CPU path.
const CPU: &str = "cpu";

/// What runs the work: the CPU, or a GPU. Cheap to clone; clones are the same device.
///
/// ```
/// let device = softhash::Device::auto()?;
/// println!("{}", device.report());
/// # Ok::<(), softhash::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Device {
    kind: Kind,
    why: Arc<str>,
}

#[derive(Clone, Debug)]
enum Kind {
    Cpu,
    #[cfg(feature = "wgpu")]
    Gpu(Arc<Context>),
    #[cfg(feature = "cuda")]
    Cuda(Arc<crate::engine::cuda::Context>),
}

/// How to open a [`Device`].
#[derive(Clone, Debug, Default)]
pub struct DeviceOptions {
    name: Option<String>,
    checked: Option<bool>,
    pipeline_cache: Option<Vec<u8>>,
    #[cfg(feature = "cuda")]
    kernel_cache: crate::engine::cuda::Place,
}

impl DeviceOptions {
    /// The same as [`Device::auto`].
    pub fn new() -> Self {
        Self::default()
    }

    /// The adapter whose name contains `part`, in any case of letters; `"cpu"` is the CPU path, and with the feature
    /// `cuda` `"cuda"` or `"cuda:1"` an NVIDIA GPU through CUDA.
    #[must_use]
    pub fn name(mut self, part: impl Into<String>) -> Self {
        self.name = Some(part.into());
        self
    }

    /// Whether shaders carry run-time checks of bounds, loops and divisions.
    ///
    /// The plans prove every index, so the checks only cost time: they are off on devices that this crate opens, and
    /// on where a host lends its own. The environment variable `SOFTHASH_CHECKED=1` decides where this is not called.
    #[must_use]
    pub fn checked(mut self, checked: bool) -> Self {
        self.checked = Some(checked);
        self
    }

    /// Compiled pipelines of an earlier run, from [`Device::pipeline_cache_data`].
    ///
    /// Damaged data and data of another adapter or driver are dropped silently. Keep it where only trusted programs
    /// write, as you would a shared library: the driver runs what is in it.
    #[must_use]
    pub fn pipeline_cache(mut self, data: Vec<u8>) -> Self {
        self.pipeline_cache = Some(data);
        self
    }

    /// Where kernels compiled for CUDA are kept, so that the next start need not compile them; `None`: nowhere.
    ///
    /// Where this is not called, the environment variable `SOFTHASH_KERNEL_CACHE` decides (a folder, or `0`), else it is
    /// `softhash/kernels` in the user's cache directory. Entries are named after all that decides about them (text,
    /// options, GPU, versions of compiler and driver) and damaged ones are made anew. Keep it where only trusted
    /// programs write, as you would a shared library.
    #[cfg(feature = "cuda")]
    #[must_use]
    pub fn kernel_cache(mut self, folder: Option<std::path::PathBuf>) -> Self {
        use crate::engine::cuda::Place;
        self.kernel_cache = folder.map_or(Place::Off, Place::Folder);
        self
    }

    /// Whether run-time checks are off, where `default` says what happens if nobody decides.
    #[cfg(feature = "wgpu")]
    fn unchecked(&self, default: bool) -> bool {
        let variable = || match variable(CHECKED_VARIABLE)?.as_str() {
            "0" | "false" | "off" => None,
            _ => Some(true),
        };
        !self.checked.or_else(variable).unwrap_or(!default)
    }
}

/// What a host should ask an adapter for, so that its device can be lent.
#[cfg(feature = "wgpu")]
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Requirements {
    /// Features without which [`Device::from_wgpu`] refuses. None at present.
    pub required_features: wgpu::Features,
    /// Limits to request: at least the defaults of WebGPU, and the adapter's own where larger ones help. A device
    /// with the defaults of WebGPU is accepted too.
    pub required_limits: wgpu::Limits,
    /// Features of this adapter that add faster variants, timing or a pipeline cache.
    pub optional_features: wgpu::Features,
}

fn variable(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

#[cfg(all(feature = "wgpu", not(target_arch = "wasm32")))]
fn block_on<T>(future: impl Future<Output = T>) -> T {
    pollster::block_on(future)
}

/// Without the GPU path no future of this module ever waits.
#[cfg(all(not(feature = "wgpu"), not(target_arch = "wasm32")))]
fn block_on<T>(future: impl Future<Output = T>) -> T {
    let mut future = std::pin::pin!(future);
    let mut context = std::task::Context::from_waker(std::task::Waker::noop());
    loop {
        if let std::task::Poll::Ready(value) = future.as_mut().poll(&mut context) {
            return value;
        }
    }
}

/// Choosing.
impl Device {
    /// The CPU path, which always works.
    pub fn cpu() -> Self {
        Self::on_cpu("asked for")
    }

    fn on_cpu(why: impl Into<Arc<str>>) -> Self {
        Self { kind: Kind::Cpu, why: why.into() }
    }

    /// The best GPU, else the CPU; [`Device::report`] says why. With the feature `cuda` and a driver, NVIDIA GPUs through
    /// CUDA come first, then those of the wgpu path (discrete, then integrated, then virtual).
    ///
    /// Adapters that compute in software (llvmpipe, SwiftShader, WARP) are passed over: the CPU path is faster. The
    /// environment variable `SOFTHASH_DEVICE` overrides the choice: `cpu`, `cuda`, or a part of any adapter's name.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where `SOFTHASH_DEVICE` names what does not exist, and that adapter's own error where it
    /// cannot be opened. Never without that variable.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn auto() -> Result<Self> {
        block_on(Self::auto_async())
    }

    /// As [`Device::auto`], without blocking.
    ///
    /// # Errors
    /// As [`Device::auto`].
    pub async fn auto_async() -> Result<Self> {
        Self::open_async(DeviceOptions::new()).await
    }

    /// The device whose name contains `part`, in any case of letters, software adapters included; the best kind where
    /// several do. `"cpu"` is the CPU path; with the feature `cuda`, `"cuda"` and `"cuda:1"` are NVIDIA GPUs through CUDA.
    ///
    /// # Errors
    /// [`Error::NoAdapter`], listing what was found; [`Error::Requirement`] and [`Error::Gpu`] where it is there but
    /// cannot be used.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn by_name(part: &str) -> Result<Self> {
        block_on(Self::by_name_async(part))
    }

    /// As [`Device::by_name`], without blocking.
    ///
    /// # Errors
    /// As [`Device::by_name`].
    pub async fn by_name_async(part: &str) -> Result<Self> {
        Self::open_async(DeviceOptions::new().name(part)).await
    }

    /// Opens as `options` say.
    ///
    /// # Errors
    /// As [`Device::by_name`] where a name is given, else as [`Device::auto`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn open(options: DeviceOptions) -> Result<Self> {
        block_on(Self::open_async(options))
    }

    /// As [`Device::open`], without blocking.
    ///
    /// # Errors
    /// As [`Device::open`].
    pub async fn open_async(options: DeviceOptions) -> Result<Self> {
        let (name, source) = match (options.name.clone(), variable(DEVICE_VARIABLE)) {
            (Some(name), _) => (Some(name), "asked for by name"),
            (None, Some(name)) => (Some(name), "asked for by SOFTHASH_DEVICE"),
            (None, None) => (None, ""),
        };
        match name {
            Some(name) if name.eq_ignore_ascii_case(CPU) => Ok(Self::on_cpu(source)),
            Some(name) => {
                #[cfg(feature = "cuda")]
                if let Some(device) = Self::named_cuda(&name, source, &options) {
                    return device;
                }
                Self::open_named(&name, source, options).await
            }
            None => {
                #[cfg_attr(not(feature = "cuda"), allow(unused_mut))]
                let mut passed_over = Vec::new();
                #[cfg(feature = "cuda")]
                if let Some(device) = Self::best_cuda(&options, &mut passed_over) {
                    return Ok(device);
                }
                Ok(Self::open_best(options, passed_over).await)
            }
        }
    }

    async fn no_adapter(name: &str, why: &str) -> Error {
        let found: Vec<_> = Self::enumerate_async().await.into_iter().map(|adapter| adapter.name).collect();
        let missing: Vec<_> = [("wgpu", cfg!(feature = "wgpu")), ("cuda", cfg!(feature = "cuda"))]
            .into_iter()
            .filter(|(_, built)| !built)
            .map(|(feature, _)| format!(" (built without the feature `{feature}`)"))
            .collect();
        let found = format!("{}{}", found.join(", "), missing.concat());
        Error::NoAdapter { wanted: format!("{name:?}, {why}"), found }
    }

    /// Everything this machine offers, as [`Device::auto`] looks at it: CUDA devices, GPU adapters, the best first, then
    /// software ones, then the CPU path.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn enumerate() -> Vec<AdapterSummary> {
        block_on(Self::enumerate_async())
    }
}

#[cfg(feature = "wgpu")]
impl Device {
    /// As [`Device::enumerate`], without blocking.
    pub async fn enumerate_async() -> Vec<AdapterSummary> {
        let adapters = gpu::adapters_best_first().await;
        let mut all: Vec<_> = adapters.iter().map(|adapter| AdapterSummary::gpu(&adapter.get_info())).collect();
        all.push(AdapterSummary::cpu());
        #[cfg(feature = "cuda")]
        Self::list_cuda(&mut all);
        all
    }

    async fn open_named(name: &str, why: &str, options: DeviceOptions) -> Result<Self> {
        let part = name.to_lowercase();
        let adapters = gpu::adapters_best_first().await;
        let Some(adapter) = adapters.iter().find(|a| a.get_info().name.to_lowercase().contains(&part)) else {
            return Err(Self::no_adapter(name, why).await);
        };
        let unchecked = options.unchecked(true);
        let context = gpu::open(adapter, unchecked, options.pipeline_cache).await?;
        Ok(Self { kind: Kind::Gpu(context), why: why.into() })
    }

    async fn open_best(options: DeviceOptions, mut passed_over: Vec<String>) -> Self {
        for adapter in gpu::adapters_best_first().await {
            let info = adapter.get_info();
            if gpu::is_software(&info) {
                passed_over.push(format!("{} computes in software and was not asked for", info.name));
                continue;
            }
            match gpu::open(&adapter, options.unchecked(true), options.pipeline_cache.clone()).await {
                Ok(context) => return Self { kind: Kind::Gpu(context), why: "the best GPU found".into() },
                Err(error) => passed_over.push(format!("{}: {error}", info.name)),
            }
        }
        if passed_over.is_empty() {
            return Self::on_cpu("no GPU adapter was found");
        }
        Self::on_cpu(format!("no GPU that can be used: {}", passed_over.join("; ")))
    }

    /// Runs on a host's own device and queue, on which the host goes on working. `info` is that of the adapter.
    ///
    /// The host's error handlers and its lost callback stay as they are and hear nothing of this crate's errors,
    /// which come back as [`Error`]. Shaders carry run-time checks; [`Device::from_wgpu_with`] can lift them.
    ///
    /// # Errors
    /// [`Error::Requirement`] where a limit is below the defaults of WebGPU (see [`Device::requirements`]),
    /// [`Error::DeviceLost`].
    pub fn from_wgpu(info: &wgpu::AdapterInfo, device: wgpu::Device, queue: wgpu::Queue) -> Result<Self> {
        Self::from_wgpu_with(info, device, queue, DeviceOptions::new())
    }

    /// As [`Device::from_wgpu`], with options; their name is not used.
    ///
    /// # Errors
    /// As [`Device::from_wgpu`].
    pub fn from_wgpu_with(
        info: &wgpu::AdapterInfo,
        device: wgpu::Device,
        queue: wgpu::Queue,
        options: DeviceOptions,
    ) -> Result<Self> {
        let unchecked = options.unchecked(false);
        let pipeline_cache = options.pipeline_cache;
        let setup = Setup { info: info.clone(), device, queue, lent: true, unchecked, pipeline_cache };
        Ok(Self { kind: Kind::Gpu(Context::new(setup)?), why: "lent by the host".into() })
    }

    /// What a host should request of `adapter` for a device that it wants to lend.
    pub fn requirements(adapter: &wgpu::Adapter) -> Requirements {
        let (optional_features, required_limits) = gpu::requirements(adapter);
        Requirements { required_features: wgpu::Features::empty(), required_limits, optional_features }
    }

    /// The wgpu device and queue, `None` on the CPU path. Buffers given to operations must be made on this device.
    pub fn as_wgpu(&self) -> Option<(&wgpu::Device, &wgpu::Queue)> {
        self.context().map(|context| (context.device(), context.queue()))
    }

    /// Timestamps on the GPU's clock, for benches; `None` where there are none.
    ///
    /// # Errors
    /// [`Error::Limit`] for no or too many spans, [`Error::OutOfMemory`], [`Error::DeviceLost`].
    #[doc(hidden)]
    pub fn timer(&self, spans: u32) -> Result<Option<Timer>> {
        self.context().map_or(Ok(None), |context| Timer::new(context, spans))
    }

    /// Begins timing all stages of calls that are submitted at once, or ends it: then the dispatches and nanoseconds of
    /// each since. Calls wait for the GPU meanwhile. For benches.
    #[doc(hidden)]
    pub fn trace_stages(&self, on: bool) -> Vec<(&'static str, u64, f64)> {
        let stages = self.context().map(|context| context.trace().set(on)).unwrap_or_default();
        stages.into_iter().map(|(stage, (count, sum))| (stage, count, sum)).collect()
    }

    pub(crate) fn context(&self) -> Option<&Arc<Context>> {
        match &self.kind {
            Kind::Gpu(context) => Some(context),
            _ => None,
        }
    }
}

#[cfg(not(feature = "wgpu"))]
impl Device {
    /// As [`Device::enumerate`], without blocking.
    pub async fn enumerate_async() -> Vec<AdapterSummary> {
        #[cfg_attr(not(feature = "cuda"), allow(unused_mut))]
        let mut all = vec![AdapterSummary::cpu()];
        #[cfg(feature = "cuda")]
        Self::list_cuda(&mut all);
        all
    }

    async fn open_named(name: &str, why: &str, _: DeviceOptions) -> Result<Self> {
        Err(Self::no_adapter(name, why).await)
    }

    async fn open_best(_: DeviceOptions, passed_over: Vec<String>) -> Self {
        match passed_over.is_empty() {
            true => Self::on_cpu("built without the feature `wgpu`"),
            false => Self::on_cpu(format!("no GPU that can be used: {}", passed_over.join("; "))),
        }
    }
}

/// Asking.
impl Device {
    /// Whether this is the CPU path.
    pub fn is_cpu(&self) -> bool {
        matches!(self.kind, Kind::Cpu)
    }

    /// `"cpu"`, `"gpu"` or `"cuda"`.
    pub fn path_name(&self) -> &'static str {
        match &self.kind {
            Kind::Cpu => CPU,
            #[cfg(feature = "wgpu")]
            Kind::Gpu(_) => "gpu",
            #[cfg(feature = "cuda")]
            Kind::Cuda(_) => "cuda",
        }
    }

    /// What runs, why, and with which kernels.
    pub fn report(&self) -> Report {
        #[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(unused_mut))]
        let mut report = Report {
            path: self.path_name(),
            why: self.why.to_string(),
            threads: rayon::current_num_threads(),
            gpu: None,
            #[cfg(feature = "cuda")]
            cuda: None,
            kernels: Vec::new(),
        };
        match &self.kind {
            Kind::Cpu => {}
            #[cfg(feature = "wgpu")]
            Kind::Gpu(context) => {
                (report.gpu, report.kernels) = (Some(GpuReport::new(context)), KernelReport::all(context));
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(context) => {
                (report.cuda, report.kernels) = (Some(CudaReport::new(context)), KernelReport::all_cuda(context));
            }
        }
        report
    }

    /// Gives back memory that is kept for results to come: on a GPU, a few of the last large ones that were let go; with
    /// CUDA, all that its pool keeps, once the work submitted so far is done, and nothing while a graph is captured.
    pub fn trim(&self) {
        match &self.kind {
            Kind::Cpu => {}
            #[cfg(feature = "wgpu")]
            Kind::Gpu(context) => drop(context.results().release()),
            // A lost device has nothing to give back, and a capture must not wait.
            #[cfg(feature = "cuda")]
            Kind::Cuda(context) => drop(context.trim("trim")),
        }
    }

    /// The pipelines compiled so far in a form that [`DeviceOptions::pipeline_cache`] takes at the next start; `None`
    /// on the CPU path and on backends that keep such caches themselves.
    pub fn pipeline_cache_data(&self) -> Option<Vec<u8>> {
        match &self.kind {
            Kind::Cpu => None,
            #[cfg(feature = "wgpu")]
            Kind::Gpu(context) => context.pipeline_cache_data(),
            #[cfg(feature = "cuda")]
            Kind::Cuda(_) => None,
        }
    }

    /// A file name for [`Device::pipeline_cache_data`] that differs between adapters.
    pub fn pipeline_cache_key(&self) -> Option<String> {
        match &self.kind {
            Kind::Cpu => None,
            #[cfg(feature = "wgpu")]
            Kind::Gpu(context) if !context.caps().pipeline_cache => None,
            #[cfg(feature = "wgpu")]
            Kind::Gpu(context) => wgpu::util::pipeline_cache_key(context.info()),
            #[cfg(feature = "cuda")]
            Kind::Cuda(_) => None,
        }
    }

    pub(crate) fn executor(&self, spec: &CacheSpec) -> Result<Box<dyn Executor>> {
        match &self.kind {
            Kind::Cpu => Ok(Box::new(CpuExecutor::new(spec)?)),
            #[cfg(feature = "wgpu")]
            Kind::Gpu(context) => Ok(Box::new(crate::socket::gpu::GpuExecutor::new(context.clone(), spec)?)),
            #[cfg(feature = "cuda")]
            Kind::Cuda(context) => crate::socket::cuda::CudaExecutor::new(context.clone(), spec),
        }
    }

    /// Waits until the work submitted so far is done, so that a stream does not run ahead of the device and fill its
    /// memory. Nothing to wait for on the CPU path, and no way to in browsers.
    #[cfg_attr(not(any(feature = "wgpu", feature = "cuda")), allow(unused_variables))]
    pub(crate) fn settle(&self, op: &'static str) -> Result<()> {
        match &self.kind {
            Kind::Cpu => Ok(()),
            #[cfg(feature = "wgpu")]
            Kind::Gpu(context) => context.settle(op),
            #[cfg(feature = "cuda")]
            Kind::Cuda(context) => context.settle(op),
        }
    }

    pub(crate) fn race_executor(
        &self,
        config: &RaceConfig,
        shape: &RaceShape,
        parameters: &Parameters,
    ) -> Result<Box<dyn RaceExecutor>> {
        match &self.kind {
            Kind::Cpu => Ok(Box::new(CpuRace::new(config, shape, parameters)?)),
            #[cfg(feature = "wgpu")]
            Kind::Gpu(context) => {
                Ok(Box::new(crate::race::gpu::GpuRace::new(context.clone(), config, shape, parameters)?))
            }
            #[cfg(feature = "cuda")]
            Kind::Cuda(context) => crate::race::cuda::CudaRace::new(context.clone(), config, shape, parameters),
        }
    }

    pub(crate) fn window_executor(&self, spec: WindowSpec) -> Result<Box<dyn WindowExecutor>> {
        match &self.kind {
            Kind::Cpu => Ok(Box::new(CpuWindow::new(spec))),
            #[cfg(feature = "wgpu")]
            Kind::Gpu(context) => Ok(Box::new(crate::race::gpu::GpuWindow::new(context.clone(), spec)?)),
            #[cfg(feature = "cuda")]
            Kind::Cuda(context) => Ok(Box::new(crate::race::cuda::CudaWindow::new(context.clone(), spec)?)),
        }
    }
}
