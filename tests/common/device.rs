//! The GPU that tests run on.

#[cfg(feature = "wgpu")]
use softhash::Device;

/// Whether that is a CUDA device, on which a test of wgpu's own buffers and encoders has nothing to do.
#[cfg(feature = "wgpu")]
#[allow(dead_code, reason = "most tests run on both")]
pub fn is_cuda() -> bool {
    let is_cuda = std::env::var("SOFTHASH_TEST_DEVICE").is_ok_and(|name| name.to_lowercase().starts_with("cuda"));
    if is_cuda {
        println!("left out: a test of wgpu, and SOFTHASH_TEST_DEVICE names a CUDA device");
    }
    is_cuda
}

/// The software adapter lavapipe, or the one that `SOFTHASH_TEST_DEVICE` names. A missing adapter fails the test.
#[cfg(feature = "wgpu")]
pub fn gpu() -> Device {
    let name = std::env::var("SOFTHASH_TEST_DEVICE").unwrap_or_else(|_| "llvmpipe".into());
    let device = Device::by_name(&name).unwrap_or_else(|e| panic!("the tests need a GPU adapter: {e}"));
    assert!(!device.is_cpu(), "{name} is no GPU adapter");
    device
}
