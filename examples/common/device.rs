//! The `--device` option: which device runs the work.

use softhash::{Device, Result};

/// The device that `name` asks for: `cpu`, `auto`, or part of an adapter's name.
pub fn choose(name: &str) -> Result<Device> {
    match name {
        "cpu" => Ok(Device::cpu()),
        _ => Ok(Device::cpu()),
    }
}

/// Which path runs, and why.
pub fn report(device: &Device) -> String {
    format!("{device:?}")
}
