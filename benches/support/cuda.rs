//! CUDA in benches: the device's own clock and its copy.

use softhash::{CudaTimer, Device};

/// Seconds of what `work` submits.
pub fn seconds(timer: &CudaTimer, work: impl FnOnce()) -> f64 {
    timer.start(0).unwrap();
    work();
    timer.stop(0).unwrap();
    timer.read_blocking().unwrap()[0].map_or(f64::NAN, |ns| ns * 1e-9)
}

/// Bytes read and written per second by the driver's own copy; `None` where the device is not CUDA.
pub fn copy_rate(device: &Device, bytes: usize) -> Option<f64> {
    let (_, stream) = device.as_cuda()?;
    let timer = device.cuda_timer(1).unwrap()?;
    let from = stream.alloc_zeros::<u8>(bytes).unwrap();
    let mut to = stream.alloc_zeros::<u8>(bytes).unwrap();
    let rate = |_| 2.0 * bytes as f64 / seconds(&timer, || stream.memcpy_dtod(&from, &mut to).unwrap());
    Some((0..10).map(rate).fold(0.0, f64::max))
}
