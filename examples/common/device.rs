//! The `--device` option: which device runs the work.

use softhash::{Device, Result};

/// The device that `name` asks for: `auto`, `cpu`, or part of an adapter's name.
pub fn choose(name: &str) -> Result<Device> {
    match name {
        "auto" => Device::auto(),
        part => Device::by_name(part),
    }
}
