//! Finding adapters and opening devices on them.

use super::caps::{is_software, requirements, verify};
use super::context::{Context, Setup};
use crate::error::{Error, Result};
use std::sync::Arc;

/// wgpu's instance, one for the whole process and for as long as it lives: NVIDIA's Vulkan driver loads and unloads
/// libraries as instances come and go, which ends the process where two threads do so at once.
#[cfg(not(target_arch = "wasm32"))]
fn instance() -> &'static wgpu::Instance {
    static INSTANCE: std::sync::OnceLock<wgpu::Instance> = std::sync::OnceLock::new();
    INSTANCE.get_or_init(new_instance)
}

#[cfg(target_arch = "wasm32")]
fn instance() -> wgpu::Instance {
    new_instance()
}

fn new_instance() -> wgpu::Instance {
    let mut descriptor = wgpu::InstanceDescriptor::new_without_display_handle();
    // Its guard dispatch costs more than the dispatch it guards, and the kernels' own grids are planned.
    descriptor.flags.remove(wgpu::InstanceFlags::VALIDATION_INDIRECT_CALL);
    wgpu::Instance::new(descriptor.with_env())
}

/// The adapters of this machine: the fastest kind of hardware first, software last.
pub(crate) async fn adapters_best_first() -> Vec<wgpu::Adapter> {
    if wgpu::Instance::enabled_backend_features().is_empty() {
        return Vec::new();
    }
    let mut adapters = instance().enumerate_adapters(wgpu::Backends::all()).await;
    adapters.sort_by_key(|adapter| {
        let info = adapter.get_info();
        match info.device_type {
            _ if is_software(&info) => 4,
            wgpu::DeviceType::DiscreteGpu => 0,
            wgpu::DeviceType::IntegratedGpu => 1,
            wgpu::DeviceType::VirtualGpu => 2,
            _ => 3,
        }
    });
    adapters
}

/// Opens an own device on an adapter.
pub(crate) async fn open(
    adapter: &wgpu::Adapter,
    unchecked: bool,
    pipeline_cache: Option<Vec<u8>>,
) -> Result<Arc<Context>> {
    let (features, limits) = requirements(adapter);
    verify(&limits)?;
    let request = wgpu::DeviceDescriptor {
        label: Some("softhash"),
        required_features: features,
        required_limits: limits,
        ..Default::default()
    };
    let info = adapter.get_info();
    let (device, queue) = adapter
        .request_device(&request)
        .await
        .map_err(|error| Error::Gpu { op: "open device", message: format!("{}: {error}", info.name) })?;
    Context::new(Setup { info, device, queue, lent: false, unchecked, pipeline_cache })
}
