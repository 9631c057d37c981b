//! What was found and what was chosen, in words and fields.

#[cfg(feature = "wgpu")]
use crate::engine::gpu::{Context, is_software};
use std::fmt;

/// One entry of [`crate::Device::enumerate`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct AdapterSummary {
    /// What [`crate::Device::by_name`] finds it under.
    pub name: String,
    /// Vulkan, Metal, Dx12, BrowserWebGpu or Cuda; `cpu` for the CPU path.
    pub backend: String,
    /// DiscreteGpu, IntegratedGpu, VirtualGpu, Cpu or Other.
    pub device_type: String,
    /// Name and version of the driver, empty where there is none.
    pub driver: String,
    /// Whether it computes on the CPU.
    pub software: bool,
}

impl AdapterSummary {
    pub(super) fn cpu() -> Self {
        Self {
            name: "cpu".into(),
            backend: "cpu".into(),
            device_type: "Cpu".into(),
            driver: String::new(),
            software: true,
        }
    }

    #[cfg(feature = "wgpu")]
    pub(super) fn gpu(info: &wgpu::AdapterInfo) -> Self {
        Self {
            name: info.name.clone(),
            backend: format!("{:?}", info.backend),
            device_type: format!("{:?}", info.device_type),
            driver: format!("{} {}", info.driver, info.driver_info).trim().to_string(),
            software: is_software(info),
        }
    }
}

impl AdapterSummary {
    #[cfg(feature = "cuda")]
    pub(super) fn cuda(name: String, driver: &str) -> Self {
        let (backend, device_type) = ("Cuda".into(), "DiscreteGpu".into());
        Self { name, backend, device_type, driver: driver.into(), software: false }
    }
}

impl fmt::Display for AdapterSummary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({}, {}", self.name, self.backend, self.device_type)?;
        if !self.driver.is_empty() {
            write!(f, ", {}", self.driver)?;
        }
        write!(f, ")")
    }
}

/// What a [`crate::Device`] is, why it was chosen, and what it runs. Printed by its `Display`.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct Report {
    /// `"cpu"`, `"gpu"` or `"cuda"`.
    pub path: &'static str,
    /// Why this path.
    pub why: String,
    /// Threads that the CPU's share of the work runs on.
    pub threads: usize,
    /// The adapter; `None` but on the wgpu path.
    pub gpu: Option<GpuReport>,
    /// The device; `None` but on the CUDA path.
    #[cfg(feature = "cuda")]
    pub cuda: Option<CudaReport>,
    /// The kernels compiled so far, sorted by label; empty on the CPU path.
    pub kernels: Vec<KernelReport>,
}

/// The GPU part of a [`Report`].
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct GpuReport {
    /// Name of the adapter.
    pub adapter: String,
    /// Vulkan, Metal, Dx12 or BrowserWebGpu.
    pub backend: String,
    /// Name and version of the driver.
    pub driver: String,
    /// Whether it computes on the CPU.
    pub software: bool,
    /// Whether shaders carry run-time checks.
    pub checked: bool,
    /// Whether shaders may compute in half precision.
    pub f16: bool,
    /// Smallest and largest subgroup where shaders may use subgroups.
    pub subgroups: Option<(u32, u32)>,
    /// Whether passes can be timed on the GPU's clock.
    pub timestamps: bool,
    /// Whether compiled pipelines can be kept, see [`crate::Device::pipeline_cache_data`].
    pub pipeline_cache: bool,
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Invocations of the largest workgroup.
    pub max_invocations: u32,
    /// Workgroups along one dimension of a dispatch.
    pub max_groups_per_dim: u32,
    /// Storage buffers that one kernel may bind.
    pub max_storage_buffers: u32,
    /// Bytes of the largest storage binding.
    pub max_storage_binding: u64,
    /// Bytes of the largest buffer.
    pub max_buffer: u64,
}

#[cfg(feature = "wgpu")]
impl GpuReport {
    pub(super) fn new(context: &Context) -> Self {
        let caps = context.caps();
        Self {
            adapter: caps.name.clone(),
            backend: format!("{:?}", caps.backend),
            driver: caps.driver.clone(),
            software: caps.is_software,
            checked: !caps.unchecked,
            f16: caps.f16,
            subgroups: caps.subgroups.then_some((caps.subgroup_min, caps.subgroup_max)),
            timestamps: caps.timestamps,
            pipeline_cache: caps.pipeline_cache,
            workgroup_memory: caps.workgroup_memory,
            max_invocations: caps.max_invocations,
            max_groups_per_dim: caps.max_groups_per_dim,
            max_storage_buffers: caps.max_storage_buffers,
            max_storage_binding: caps.max_storage_binding,
            max_buffer: caps.max_buffer,
        }
    }
}

/// The CUDA part of a [`Report`].
#[cfg(feature = "cuda")]
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CudaReport {
    /// The device's name, as [`crate::Device::enumerate`] lists it.
    pub adapter: String,
    /// CUDA version of the driver.
    pub driver: String,
    /// Version of the kernel compiler, NVRTC.
    pub nvrtc: String,
    /// What kernels are compiled for.
    pub arch: String,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block can have.
    pub shared_memory: u32,
    /// Bytes of the L2 cache.
    pub l2_cache: u64,
    /// Bytes of device memory.
    pub memory: u64,
    /// Where compiled kernels are kept, if they are.
    pub kernel_cache: Option<std::path::PathBuf>,
}

#[cfg(feature = "cuda")]
impl CudaReport {
    pub(super) fn new(context: &crate::engine::cuda::Context) -> Self {
        let caps = context.caps();
        Self {
            adapter: format!("cuda:{} {}", caps.ordinal, caps.name),
            driver: caps.driver.to_string(),
            nvrtc: caps.nvrtc.to_string(),
            arch: context.arch(),
            multiprocessors: caps.multiprocessors,
            shared_memory: caps.shared_memory,
            l2_cache: caps.l2_cache,
            memory: caps.memory,
            kernel_cache: context.cache_folder().map(Into::into),
        }
    }
}

#[cfg(feature = "cuda")]
impl fmt::Display for CudaReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "adapter: {} ({})", self.adapter, self.arch)?;
        write!(f, "\ndriver: CUDA {}, NVRTC {}", self.driver, self.nvrtc)?;
        write!(f, "\nmultiprocessors: {} with {} bytes a block", self.multiprocessors, self.shared_memory)?;
        write!(f, "\nmemory: {}, L2 cache {}", mib(self.memory), mib(self.l2_cache))?;
        match &self.kernel_cache {
            Some(folder) => write!(f, "\nkernel cache: {}", folder.display()),
            None => write!(f, "\nkernel cache: off"),
        }
    }
}

/// One compiled kernel of a [`Report`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelReport {
    /// The kernel and its variant.
    pub label: String,
    /// Whether this variant computes in half precision.
    pub f16: bool,
    /// Whether this variant uses subgroups.
    pub subgroups: bool,
    /// What it takes of a multiprocessor; `None` where the API does not say.
    pub resources: Option<KernelResources>,
}

/// What one compiled kernel takes of a multiprocessor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct KernelResources {
    /// Registers of a thread.
    pub registers: u32,
    /// Bytes of local memory of a thread, spilled registers among them.
    pub local: u32,
    /// Bytes of static shared memory of a block.
    pub shared: u32,
    /// Whether its code was found in the kernel cache.
    pub from_disk: bool,
}

#[cfg(feature = "wgpu")]
impl KernelReport {
    pub(super) fn all(context: &Context) -> Vec<Self> {
        let report = |p: &crate::engine::gpu::Pipeline| Self {
            label: p.label.clone(),
            f16: p.uses_f16,
            subgroups: p.uses_subgroups,
            resources: None,
        };
        context.compiled().iter().map(|pipeline| report(pipeline)).collect()
    }
}

#[cfg(feature = "cuda")]
impl KernelReport {
    pub(super) fn all_cuda(context: &crate::engine::cuda::Context) -> Vec<Self> {
        let report = |kernel: &crate::engine::cuda::Kernel| {
            let (registers, local, shared) = (kernel.registers, kernel.local, kernel.shared);
            let resources = KernelResources { registers, local, shared, from_disk: kernel.from_disk };
            Self { label: kernel.label.clone(), f16: false, subgroups: false, resources: Some(resources) }
        };
        context.compiled().iter().map(|kernel| report(kernel)).collect()
    }
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

impl fmt::Display for GpuReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let software = if self.software { ", software" } else { "" };
        write!(f, "adapter: {} ({}{software})", self.adapter, self.backend)?;
        write!(f, "\ndriver: {}", self.driver)?;
        write!(f, "\nshaders: {}", if self.checked { "checked" } else { "unchecked" })?;
        write!(f, "\nf16: {}", yes(self.f16))?;
        match self.subgroups {
            Some((min, max)) => write!(f, "\nsubgroups: {min} to {max}")?,
            None => write!(f, "\nsubgroups: no")?,
        }
        write!(f, "\ntimestamps: {}, pipeline cache: {}", yes(self.timestamps), yes(self.pipeline_cache))?;
        write!(f, "\nworkgroups: {} bytes of memory, {} invocations", self.workgroup_memory, self.max_invocations)?;
        write!(f, "\ndispatch: {} workgroups per dimension", self.max_groups_per_dim)?;
        write!(f, "\nstorage: {} bindings of {}", self.max_storage_buffers, mib(self.max_storage_binding))?;
        write!(f, ", buffers of {}", mib(self.max_buffer))
    }
}

impl fmt::Display for KernelReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.label)?;
        if self.f16 {
            f.write_str(" [f16]")?;
        }
        if self.subgroups {
            f.write_str(" [subgroups]")?;
        }
        let Some(resources) = &self.resources else { return Ok(()) };
        write!(f, " [{} registers, {} bytes local", resources.registers, resources.local)?;
        write!(f, ", {} bytes shared", resources.shared)?;
        f.write_str(if resources.from_disk { ", cached]" } else { "]" })
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "path: {} ({})", self.path, self.why)?;
        let gpu = self.gpu.as_ref().map(ToString::to_string);
        #[cfg(feature = "cuda")]
        let gpu = gpu.or_else(|| self.cuda.as_ref().map(ToString::to_string));
        let Some(gpu) = gpu else {
            return write!(f, "\nthreads: {}", self.threads);
        };
        write!(f, "\n{gpu}")?;
        if self.kernels.is_empty() {
            return write!(f, "\nkernels: none compiled yet");
        }
        write!(f, "\nkernels:")?;
        self.kernels.iter().try_for_each(|kernel| write!(f, "\n  {kernel}"))
    }
}
