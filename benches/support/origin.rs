//! Where figures come from, and what the device can move at most.

use super::ceiling;
use serde::Serialize;
use softhash::Device;

/// Device, driver, commit and time of a run, and the ceilings that its figures are held against.
#[derive(Clone, Serialize)]
pub struct Origin {
    pub device: String,
    pub backend: String,
    pub driver: String,
    pub checked: bool,
    pub commit: String,
    pub unix_time: u64,
    pub copy_bytes_per_second: f64,
    pub read_bytes_per_second: f64,
}

/// Seconds since 1970.
pub fn now() -> u64 {
    std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).map_or(0, |d| d.as_secs())
}

pub fn commit() -> String {
    // Baked in where the executable is carried to a machine without the repository.
    if let Some(commit) = option_env!("SOFTHASH_COMMIT") {
        return commit.into();
    }
    let git = std::process::Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    git.ok().and_then(|o| String::from_utf8(o.stdout).ok()).map_or("unknown".into(), |s| s.trim().into())
}

impl Origin {
    /// Describes the device and measures its copy.
    pub fn new(device: &Device) -> Self {
        let report = device.report();
        let (device_name, backend, driver) = match report.gpu.as_ref() {
            Some(gpu) => (gpu.adapter.clone(), gpu.backend.clone(), gpu.driver.clone()),
            None => (format!("CPU, {} threads", report.threads), "cpu".into(), String::new()),
        };
        #[cfg(feature = "cuda")]
        let (device_name, backend, driver) = match report.cuda.as_ref() {
            Some(cuda) => {
                let version = std::fs::read_to_string("/sys/module/nvidia/version").unwrap_or_default();
                let driver = format!("{} CUDA {}, NVRTC {}", version.trim(), cuda.driver, cuda.nvrtc);
                (cuda.adapter.clone(), "CUDA".into(), driver.trim().into())
            }
            None => (device_name, backend, driver),
        };
        let [copy_bytes_per_second, read_bytes_per_second] = ceiling::measure(device);
        println!("copy: {:.1} GB/s, read and written bytes counted", copy_bytes_per_second * 1e-9);
        println!("read: {:.1} GB/s", read_bytes_per_second * 1e-9);
        Self {
            device: device_name,
            backend,
            driver,
            checked: report.gpu.is_some_and(|g| g.checked),
            commit: commit(),
            unix_time: now(),
            copy_bytes_per_second,
            read_bytes_per_second,
        }
    }

    pub fn print(&self) {
        println!("\n{} {} {} commit {}", self.device, self.backend, self.driver, self.commit);
    }
}
