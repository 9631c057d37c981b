//! What a device can do, and what the kernels need of it.

use crate::error::{Error, Result};
use wgpu::{Features, Limits};

/// Features that only add variants; every kernel has a twin without them.
const OPTIONAL: Features =
    Features::SHADER_F16.union(Features::SUBGROUP).union(Features::TIMESTAMP_QUERY).union(Features::PIPELINE_CACHE);

/// What was found out about a device.
#[derive(Clone, Debug)]
pub(crate) struct Caps {
    pub name: String,
    pub backend: wgpu::Backend,
    pub driver: String,
    pub is_software: bool,
    pub f16: bool,
    pub subgroups: bool,
    pub subgroup_min: u32,
    pub subgroup_max: u32,
    pub timestamps: bool,
    pub pipeline_cache: bool,
    /// Bytes of the largest storage binding.
    pub max_storage_binding: u64,
    /// Bytes of the largest buffer.
    pub max_buffer: u64,
    /// Bytes of workgroup memory.
    pub workgroup_memory: u32,
    /// Invocations of the largest workgroup.
    pub max_invocations: u32,
    /// Workgroups along one dimension of a dispatch.
    pub max_groups_per_dim: u32,
    /// Alignment of a storage binding's offset.
    pub storage_align: u32,
    /// Alignment of a uniform binding's offset.
    pub uniform_align: u32,
    /// Storage buffers of one shader stage.
    pub max_storage_buffers: u32,
    /// Whether shaders run without the run-time checks of bounds, loops and divisions.
    pub unchecked: bool,
    /// Nanoseconds per timestamp tick.
    pub timestamp_period: f32,
}

impl Caps {
    pub fn new(info: &wgpu::AdapterInfo, device: &wgpu::Device, queue: &wgpu::Queue, unchecked: bool) -> Self {
        let (features, limits) = (device.features(), device.limits());
        // Browsers report sizes of 0; such subgroups cannot be planned for.
        let subgroups = features.contains(Features::SUBGROUP) && info.subgroup_min_size > 0;
        let timestamps = features.contains(Features::TIMESTAMP_QUERY);
        let driver = [info.driver.as_str(), info.driver_info.as_str()].join(" ").trim().to_string();
        Self {
            name: info.name.clone(),
            backend: info.backend,
            driver,
            is_software: is_software(info),
            f16: features.contains(Features::SHADER_F16),
            subgroups,
            subgroup_min: info.subgroup_min_size,
            subgroup_max: info.subgroup_max_size,
            timestamps,
            pipeline_cache: features.contains(Features::PIPELINE_CACHE),
            max_storage_binding: limits.max_storage_buffer_binding_size,
            max_buffer: limits.max_buffer_size,
            workgroup_memory: limits.max_compute_workgroup_storage_size,
            max_invocations: limits.max_compute_invocations_per_workgroup,
            max_groups_per_dim: limits.max_compute_workgroups_per_dimension,
            storage_align: limits.min_storage_buffer_offset_alignment,
            uniform_align: limits.min_uniform_buffer_offset_alignment,
            max_storage_buffers: limits.max_storage_buffers_per_shader_stage,
            unchecked,
            timestamp_period: if timestamps { queue.get_timestamp_period() } else { 0.0 },
        }
    }
}

/// Whether the adapter computes on the CPU.
pub(crate) fn is_software(info: &wgpu::AdapterInfo) -> bool {
    let name = info.name.to_lowercase();
    info.device_type == wgpu::DeviceType::Cpu
        || ["llvmpipe", "lavapipe", "swiftshader", "basic render"].iter().any(|soft| name.contains(soft))
}

/// Optional features that the adapter has, and the limits to ask it for.
pub(crate) fn requirements(adapter: &wgpu::Adapter) -> (Features, Limits) {
    let has = adapter.limits();
    let mut limits = Limits::defaults().or_worse_values_from(&has);
    limits.max_storage_buffer_binding_size = has.max_storage_buffer_binding_size;
    limits.max_buffer_size = has.max_buffer_size;
    limits.max_compute_workgroup_storage_size = has.max_compute_workgroup_storage_size;
    limits.max_compute_invocations_per_workgroup = has.max_compute_invocations_per_workgroup;
    limits.max_compute_workgroup_size_x = has.max_compute_workgroup_size_x;
    limits.min_storage_buffer_offset_alignment = has.min_storage_buffer_offset_alignment;
    limits.min_uniform_buffer_offset_alignment = has.min_uniform_buffer_offset_alignment;
    (adapter.features() & OPTIONAL, limits)
}

/// Refuses limits below what the kernels need: the defaults of WebGPU.
pub(super) fn verify(limits: &Limits) -> Result<()> {
    let floor = Limits::defaults();
    let needs = [
        // The kernels bind seven; one is left to backends that need a buffer of their own.
        (
            "max_storage_buffers_per_shader_stage",
            limits.max_storage_buffers_per_shader_stage.into(),
            floor.max_storage_buffers_per_shader_stage.into(),
        ),
        (
            "max_compute_workgroup_storage_size",
            limits.max_compute_workgroup_storage_size.into(),
            floor.max_compute_workgroup_storage_size.into(),
        ),
        (
            "max_compute_invocations_per_workgroup",
            limits.max_compute_invocations_per_workgroup.into(),
            floor.max_compute_invocations_per_workgroup.into(),
        ),
        (
            "max_compute_workgroup_size_x",
            limits.max_compute_workgroup_size_x.into(),
            floor.max_compute_workgroup_size_x.into(),
        ),
        (
            "max_compute_workgroups_per_dimension",
            limits.max_compute_workgroups_per_dimension.into(),
            floor.max_compute_workgroups_per_dimension.into(),
        ),
        (
            "max_storage_buffer_binding_size",
            limits.max_storage_buffer_binding_size,
            floor.max_storage_buffer_binding_size,
        ),
        ("max_buffer_size", limits.max_buffer_size, floor.max_buffer_size),
    ];
    match needs.into_iter().find(|&(_, got, needed): &(&str, u64, u64)| got < needed) {
        None => Ok(()),
        Some((what, got, needed)) => Err(Error::Requirement {
            what: format!("limit {what}"),
            got: got.to_string(),
            needed: format!("at least {needed}"),
        }),
    }
}
