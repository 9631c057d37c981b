//! CUDA devices: choosing, lending, capturing.

use super::{CPU, Device, DeviceOptions, Kind};
use crate::device::report::AdapterSummary;
use crate::engine::cuda::{self, Context, CudaGraph, CudaTimer};
use crate::error::{Error, Result};
use cudarc::driver::{CudaContext, CudaStream};
use std::sync::Arc;

/// Prefix of the names of CUDA devices.
const CUDA: &str = "cuda";

/// CUDA.
impl Device {
    /// The NVIDIA GPU number `ordinal` through CUDA, as `Device::by_name("cuda:0")` does.
    ///
    /// # Errors
    /// [`Error::NoAdapter`] where there is no driver or no such device; [`Error::Requirement`] where the driver, the
    /// GPU or the kernel compiler (NVRTC) is too old or missing.
    pub fn cuda(ordinal: usize) -> Result<Self> {
        Self::open_cuda(ordinal, "asked for by ordinal", &DeviceOptions::new())
    }

    /// Runs on a host's own stream, in its context, which the host goes on using. All work is submitted to that stream
    /// and nothing waits for it but reads, so the host orders its own work by the stream as it does between its kernels;
    /// calls may be captured into a graph once their scratch memory is warm. This device and the results must be kept for
    /// as long as such a graph is launched. A call leaves the context current on its thread.
    ///
    /// # Errors
    /// As [`Device::cuda`].
    pub fn from_cuda(stream: Arc<CudaStream>) -> Result<Self> {
        Self::from_cuda_with(stream, DeviceOptions::new())
    }

    /// As [`Device::from_cuda`], with options; their name is not used.
    ///
    /// # Errors
    /// As [`Device::cuda`].
    pub fn from_cuda_with(stream: Arc<CudaStream>, options: DeviceOptions) -> Result<Self> {
        Ok(Self { kind: Kind::Cuda(Context::new(stream, options.kernel_cache)?), why: "lent by the host".into() })
    }

    /// The CUDA context and the stream that all work goes through; `None` on other paths.
    pub fn as_cuda(&self) -> Option<(&Arc<CudaContext>, &Arc<CudaStream>)> {
        self.cuda_context().map(|context| (context.context(), context.stream()))
    }

    /// Captures what `steps` submits to this device into a graph, which does it again at every
    /// [`CudaGraph::launch`]. Nothing runs before the first.
    ///
    /// Call the same steps once before, so that kernels are compiled and scratch memory is as large as needed; inputs
    /// must be CUDA memory, which every replay reads anew, and results are written to the same memory every time. The
    /// graph keeps memory of this crate's; what the caller lent must stay. Views of `CudaSlice`s are made before; and
    /// while it lasts, no other thread uses the device, whose work would become part of the graph.
    ///
    /// What calls count on the host, as [`crate::RaceState::tokens`] or a cache's lengths, they count once, when they are
    /// captured, also where the capture fails later, and not at replays. Appended rows and results hold anything until
    /// the first launch. A launch attends to, and
    /// appends to, the pages that the cache had when it was captured.
    ///
    /// # Errors
    /// [`Error::WrongDevice`] on other paths; what `steps` returns; [`Error::Unsupported`] for steps that wait or read
    /// host memory.
    pub fn capture<T>(&self, steps: impl FnOnce() -> Result<T>) -> Result<(CudaGraph, T)> {
        let (op, tensor, got) = ("capture", "the device", self.path_name());
        let wrong = || Error::WrongDevice { op, tensor, got, expected: "a CUDA device" };
        self.cuda_context().ok_or_else(wrong)?.capture(steps)
    }

    /// Times on the GPU's clock, for benches; `None` where there are none.
    ///
    /// # Errors
    /// [`Error::Limit`] for no or too many spans, [`Error::DeviceLost`].
    #[doc(hidden)]
    pub fn cuda_timer(&self, spans: u32) -> Result<Option<CudaTimer>> {
        self.cuda_context().map_or(Ok(None), |context| CudaTimer::new(context, spans))
    }

    pub(crate) fn cuda_context(&self) -> Option<&Arc<Context>> {
        match &self.kind {
            Kind::Cuda(context) => Some(context),
            _ => None,
        }
    }

    fn open_cuda(ordinal: usize, why: &str, options: &DeviceOptions) -> Result<Self> {
        let context = Context::open(ordinal, options.kernel_cache.clone())?;
        Ok(Self { kind: Kind::Cuda(context), why: why.into() })
    }

    /// The CUDA device of that name: `cuda`, `cuda:1`, or as [`Device::enumerate`] lists it. `None` where the name is
    /// not one of CUDA's.
    pub(super) fn named_cuda(name: &str, why: &str, options: &DeviceOptions) -> Option<Result<Self>> {
        let name = name.to_lowercase();
        let rest = name.strip_prefix(CUDA)?;
        let ordinal = match rest.strip_prefix(':').map(|rest| rest.split(' ').next().unwrap_or(rest)) {
            Some(number) => number.parse().ok(),
            None if rest.is_empty() => Some(0),
            None => return None,
        };
        let absent = |found: String| {
            Some(Err(Error::NoAdapter { wanted: format!("{name:?}, {why}"), found: format!("{found}; {CPU}") }))
        };
        if let Err(reason) = cuda::driver() {
            return absent(reason.to_string());
        }
        let found = cuda::devices();
        match ordinal {
            Some(ordinal) if ordinal < found.len() => Some(Self::open_cuda(ordinal, why, options)),
            _ => absent(found.iter().map(name_of).collect::<Vec<_>>().join(", ")),
        }
    }

    /// The first CUDA device that can be used; the reasons against those before it are added to `passed_over`.
    pub(super) fn best_cuda(options: &DeviceOptions, passed_over: &mut Vec<String>) -> Option<Self> {
        for device in cuda::devices() {
            match Self::open_cuda(device.ordinal, "the best GPU found", options) {
                Ok(device) => return Some(device),
                Err(error) => passed_over.push(format!("{}: {error}", name_of(&device))),
            }
        }
        None
    }

    /// Adds the CUDA devices where [`Device::auto`] looks for them: before all others.
    pub(super) fn list_cuda(all: &mut Vec<AdapterSummary>) {
        let driver = cuda::driver().map_or(String::new(), |version| format!("CUDA {version}"));
        all.splice(0..0, cuda::devices().iter().map(|device| AdapterSummary::cuda(name_of(device), &driver)));
    }
}

fn name_of(device: &cuda::Found) -> String {
    format!("{CUDA}:{} {}", device.ordinal, device.name)
}
