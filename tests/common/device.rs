//! The GPU that tests run on.

#[cfg(feature = "wgpu")]
use softhash::Device;

/// The software adapter lavapipe, or the one that `SOFTHASH_TEST_DEVICE` names. A missing adapter fails the test.
#[cfg(feature = "wgpu")]
pub fn gpu() -> Device {
    let name = std::env::var("SOFTHASH_TEST_DEVICE").unwrap_or_else(|_| "llvmpipe".into());
    let device = Device::by_name(&name).unwrap_or_else(|e| panic!("the tests need a GPU adapter: {e}"));
    assert!(!device.is_cpu(), "{name} is no GPU adapter");
    device
}
