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
    /// Vulkan, Metal, Dx12 or BrowserWebGpu; `cpu` for the CPU path.
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
    /// `"cpu"` or `"gpu"`.
    pub path: &'static str,
    /// Why this path.
    pub why: String,
    /// Threads that the CPU's share of the work runs on.
    pub threads: usize,
    /// The adapter; `None` on the CPU path.
    pub gpu: Option<GpuReport>,
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
}

#[cfg(feature = "wgpu")]
impl KernelReport {
    pub(super) fn all(context: &Context) -> Vec<Self> {
        let report = |p: &crate::engine::gpu::Pipeline| Self {
            label: p.label.clone(),
            f16: p.uses_f16,
            subgroups: p.uses_subgroups,
        };
        context.compiled().iter().map(|pipeline| report(pipeline)).collect()
    }
}

fn yes(value: bool) -> &'static str {
    if value { "yes" } else { "no" }
}

fn mib(bytes: u64) -> String {
    format!("{} MiB", bytes >> 20)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "path: {} ({})", self.path, self.why)?;
        let Some(gpu) = &self.gpu else {
            return write!(f, "\nthreads: {}", self.threads);
        };
        let software = if gpu.software { ", software" } else { "" };
        write!(f, "\nadapter: {} ({}{software})", gpu.adapter, gpu.backend)?;
        write!(f, "\ndriver: {}", gpu.driver)?;
        write!(f, "\nshaders: {}", if gpu.checked { "checked" } else { "unchecked" })?;
        write!(f, "\nf16: {}", yes(gpu.f16))?;
        match gpu.subgroups {
            Some((min, max)) => write!(f, "\nsubgroups: {min} to {max}")?,
            None => write!(f, "\nsubgroups: no")?,
        }
        write!(f, "\ntimestamps: {}, pipeline cache: {}", yes(gpu.timestamps), yes(gpu.pipeline_cache))?;
        write!(f, "\nworkgroups: {} bytes of memory, {} invocations", gpu.workgroup_memory, gpu.max_invocations)?;
        write!(f, "\ndispatch: {} workgroups per dimension", gpu.max_groups_per_dim)?;
        write!(f, "\nstorage: {} bindings of {}", gpu.max_storage_buffers, mib(gpu.max_storage_binding))?;
        write!(f, ", buffers of {}", mib(gpu.max_buffer))?;
        if self.kernels.is_empty() {
            return write!(f, "\nkernels: none compiled yet");
        }
        write!(f, "\nkernels:")?;
        for kernel in &self.kernels {
            let f16 = if kernel.f16 { " [f16]" } else { "" };
            let subgroups = if kernel.subgroups { " [subgroups]" } else { "" };
            write!(f, "\n  {}{f16}{subgroups}", kernel.label)?;
        }
        Ok(())
    }
}
