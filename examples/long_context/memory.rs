//! How much memory a run took at most.

use softhash::Device;

/// The most seen so far.
pub struct Peak {
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    device: Device,
    /// Bytes that wgpu holds on the device, where it keeps account of them; with CUDA all that is taken there, the
    /// context and other processes included.
    on_device: Option<u64>,
}

impl Peak {
    #[cfg_attr(
        not(any(feature = "wgpu", feature = "cuda")),
        allow(unused_variables, reason = "only a GPU has memory of its own")
    )]
    pub fn new(device: &Device) -> Self {
        Self {
            #[cfg(any(feature = "wgpu", feature = "cuda"))]
            device: device.clone(),
            on_device: None,
        }
    }

    /// Looks at the device; the system keeps the process's peak itself.
    pub fn sample(&mut self) {
        #[cfg(feature = "wgpu")]
        if let Some(report) = self.device.as_wgpu().and_then(|(gpu, _)| gpu.generate_allocator_report()) {
            self.on_device = self.on_device.max(Some(report.total_allocated_bytes));
        }
        #[cfg(feature = "cuda")]
        if let Some(bytes) = crate::cuda::memory_taken(&self.device) {
            self.on_device = self.on_device.max(Some(bytes));
        }
    }

    pub fn print(&self, of_generator: u64) {
        if let Some(bytes) = of_process() {
            println!("memory    {:9} MiB at most, of the process", bytes >> 20);
        }
        if let Some(bytes) = self.on_device {
            println!(
                "          {:9} MiB at most, on the device, {} of the tensors' maker",
                bytes >> 20,
                of_generator >> 20
            );
        }
    }
}

/// Largest resident size of this process; Linux only.
fn of_process() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
}
