//! The wgpu instance of a test that is a host.

use softhash::{Device, wgpu};
use std::sync::OnceLock;

/// One for the whole process, made after the library's: NVIDIA's Vulkan driver cannot make two at once.
pub fn instance() -> &'static wgpu::Instance {
    static INSTANCE: OnceLock<wgpu::Instance> = OnceLock::new();
    INSTANCE.get_or_init(|| {
        Device::enumerate();
        wgpu::Instance::new(wgpu::InstanceDescriptor::new_without_display_handle())
    })
}
