//! The NVIDIA driver and its compiler, asked for before anything of theirs is called: the bindings load both at their
//! first use and panic where a library is missing.

use crate::error::{Error, Result};
use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys::{self, CUdevice_attribute_enum as Attribute, CUresult};
use std::sync::OnceLock;

/// The oldest driver whose symbols the engine calls; those of later versions are asked for where they are used.
const OLDEST_DRIVER: Version = Version(12, 0);
/// The oldest GPUs that the kernels are written for: bf16, asynchronous copies.
const OLDEST_GPU: (i32, i32) = (8, 0);

/// What is called before the version is known.
const FIRST_CALLS: [&str; 4] = ["cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuGetErrorString"];

/// Major and minor version of CUDA, as drivers and compilers count.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Version(pub i32, pub i32);

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

/// Why there is no CUDA here, in words.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Absent {
    /// No driver library.
    Driver,
    /// A driver that cannot be used.
    Broken(String),
    /// A driver without a device.
    Device,
}

impl std::fmt::Display for Absent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Driver => f.write_str("no NVIDIA driver (libcuda) on this machine"),
            Self::Broken(why) => write!(f, "the NVIDIA driver cannot be used: {why}"),
            Self::Device => f.write_str("the NVIDIA driver sees no device"),
        }
    }
}

/// The driver's version, once it is loaded and initialised; asked once, for neither comes or goes while a process runs.
pub(crate) fn driver() -> std::result::Result<Version, Absent> {
    static FOUND: OnceLock<std::result::Result<Version, Absent>> = OnceLock::new();
    FOUND.get_or_init(load).clone()
}

fn load() -> std::result::Result<Version, Absent> {
    // SAFETY: loading a library runs its initialisers; this one is the system's own driver.
    if !unsafe { sys::is_culib_present() } {
        return Err(Absent::Driver);
    }
    // SAFETY: it is present, and the symbols are looked up, not called.
    let has = |name: &&str| unsafe { sys::culib().get::<*const ()>(name.as_bytes()) }.is_ok();
    if let Some(name) = FIRST_CALLS.iter().find(|name| !has(name)) {
        return Err(Absent::Broken(format!("its library has no {name}")));
    }
    let broken = |error: DriverError| match error.0 {
        CUresult::CUDA_ERROR_NO_DEVICE => Absent::Device,
        CUresult::CUDA_ERROR_STUB_LIBRARY => Absent::Broken("its library is the toolkit's stub".into()),
        _ => Absent::Broken(words(error)),
    };
    result::init().map_err(broken)?;
    let mut version = 0;
    // SAFETY: the driver writes the one integer that it is given.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(broken)?;
    match result::device::get_count().map_err(broken)? {
        0 => Err(Absent::Device),
        _ => Ok(Version(version / 1000, version % 1000 / 10)),
    }
}

/// The compiler's version; `None` where its library is not to be found.
pub(crate) fn nvrtc() -> Option<Version> {
    static FOUND: OnceLock<Option<Version>> = OnceLock::new();
    *FOUND.get_or_init(|| {
        // SAFETY: as for the driver.
        if !unsafe { cudarc::nvrtc::sys::is_culib_present() } {
            return None;
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: the compiler writes the two integers that it is given.
        let asked = unsafe { cudarc::nvrtc::sys::nvrtcVersion(&raw mut major, &raw mut minor) };
        asked.result().is_ok().then_some(Version(major, minor))
    })
}

/// Both versions, where both can be used together.
pub(crate) fn versions() -> Result<(Version, Version)> {
    let wanted = || "CUDA".to_string();
    let driver = driver().map_err(|absent| Error::NoAdapter { wanted: wanted(), found: absent.to_string() })?;
    check_versions(driver, nvrtc())
}

/// See [`versions`].
fn check_versions(driver: Version, nvrtc: Option<Version>) -> Result<(Version, Version)> {
    let lacks = |what: &str, got: String, needed: String| Error::Requirement { what: what.into(), got, needed };
    if driver < OLDEST_DRIVER {
        let needed = format!("at least {OLDEST_DRIVER}");
        return Err(lacks("the CUDA version of the NVIDIA driver", driver.to_string(), needed));
    }
    let Some(nvrtc) = nvrtc else {
        let needed = "libnvrtc of the CUDA toolkit or of the Python package nvidia-cuda-nvrtc on the library path";
        return Err(lacks("the kernel compiler NVRTC", "missing".into(), needed.into()));
    };
    // Within one major version older drivers run what newer compilers make.
    if nvrtc.0 > driver.0 {
        let needed = format!("at most {}.x, as the NVIDIA driver is of CUDA {driver}", driver.0);
        return Err(lacks("the version of NVRTC", nvrtc.to_string(), needed));
    }
    Ok((driver, nvrtc))
}

/// What can be known of a device without opening it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Found {
    pub ordinal: usize,
    pub name: String,
}

/// The devices, in the driver's order; none where there is no driver.
pub(crate) fn devices() -> Vec<Found> {
    if driver().is_err() {
        return Vec::new();
    }
    let count = result::device::get_count().unwrap_or(0);
    let found = |ordinal: i32| {
        let name = result::device::get(ordinal).and_then(result::device::get_name).ok()?;
        Some(Found { ordinal: ordinal as usize, name })
    };
    (0..count).filter_map(found).collect()
}

/// An attribute of a device, 0 where the driver does not know it.
pub(super) fn attribute(device: sys::CUdevice, attribute: Attribute) -> i32 {
    // SAFETY: `device` comes from the driver.
    unsafe { result::device::get_attribute(device, attribute) }.unwrap_or(0)
}

/// Major and minor compute capability, if the kernels run on it.
pub(super) fn check_capability(name: &str, capability: (i32, i32)) -> Result<()> {
    if capability >= OLDEST_GPU {
        return Ok(());
    }
    Err(Error::Requirement {
        what: format!("the compute capability of {name}"),
        got: format!("{}.{}", capability.0, capability.1),
        needed: format!("at least {}.{}", OLDEST_GPU.0, OLDEST_GPU.1),
    })
}

/// A driver's error in its own words, on one line.
pub(super) fn words(error: DriverError) -> String {
    match error.error_string() {
        Ok(text) => format!("{} ({:?})", text.to_string_lossy(), error.0),
        Err(_) => format!("{:?}", error.0),
    }
}

/// Whether the context is unusable from here on.
pub(super) fn is_sticky(error: CUresult) -> bool {
    use CUresult as R;
    matches!(
        error,
        R::CUDA_ERROR_DEINITIALIZED
            | R::CUDA_ERROR_DEVICE_UNAVAILABLE
            | R::CUDA_ERROR_ECC_UNCORRECTABLE
            | R::CUDA_ERROR_NVLINK_UNCORRECTABLE
            | R::CUDA_ERROR_CONTAINED
            | R::CUDA_ERROR_ILLEGAL_ADDRESS
            | R::CUDA_ERROR_LAUNCH_TIMEOUT
            | R::CUDA_ERROR_CONTEXT_IS_DESTROYED
            | R::CUDA_ERROR_ASSERT
            | R::CUDA_ERROR_HARDWARE_STACK_ERROR
            | R::CUDA_ERROR_ILLEGAL_INSTRUCTION
            | R::CUDA_ERROR_MISALIGNED_ADDRESS
            | R::CUDA_ERROR_INVALID_ADDRESS_SPACE
            | R::CUDA_ERROR_INVALID_PC
            | R::CUDA_ERROR_LAUNCH_FAILED
            | R::CUDA_ERROR_TENSOR_MEMORY_LEAK
            | R::CUDA_ERROR_MPS_CLIENT_TERMINATED
            | R::CUDA_ERROR_EXTERNAL_DEVICE
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn versions_that_do_not_fit_are_told_apart() {
        let v = Version;
        assert_eq!(check_versions(v(13, 0), Some(v(13, 5))).unwrap(), (v(13, 0), v(13, 5)));
        assert_eq!(check_versions(v(13, 0), Some(v(12, 8))).unwrap(), (v(13, 0), v(12, 8)));
        for (driver, nvrtc, part) in [
            (v(11, 8), Some(v(11, 8)), "the NVIDIA driver is 11.8, the kernels need at least 12.0"),
            (v(12, 9), Some(v(13, 0)), "NVRTC is 13.0, the kernels need at most 12.x"),
            (v(12, 9), None, "NVRTC is missing"),
        ] {
            let error = check_versions(driver, nvrtc).unwrap_err().to_string();
            assert!(error.contains(part) && !error.contains('\n'), "{error}");
        }
        assert!(check_capability("a GPU", (8, 0)).is_ok());
        let error = check_capability("a GPU", (7, 5)).unwrap_err().to_string();
        assert_eq!(error, "device: the compute capability of a GPU is 7.5, the kernels need at least 8.0");
    }

    #[test]
    fn asking_never_panics() {
        match (driver(), devices()) {
            (Ok(version), devices) => assert!(version.0 >= 9 && !devices.is_empty()),
            (Err(absent), devices) => assert!(devices.is_empty() && !absent.to_string().contains('\n'), "{absent}"),
        }
        assert!(nvrtc().is_none_or(|version| version.0 >= 9));
    }
}
