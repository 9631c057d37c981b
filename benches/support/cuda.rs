//! CUDA in benches: the device's own clock, its copy and its read.

use softhash::cudarc::driver::{LaunchConfig, PushKernelArg};
use softhash::cudarc::nvrtc::compile_ptx;
use softhash::{CudaTimer, Device};

/// Seconds of what `work` submits.
pub fn seconds(timer: &CudaTimer, work: impl FnOnce()) -> f64 {
    timer.start(0).unwrap();
    work();
    timer.stop(0).unwrap();
    timer.read_blocking().unwrap()[0].map_or(f64::NAN, |ns| ns * 1e-9)
}

const READ: &str = r#"extern "C" __global__ void read_all(const uint4* from, unsigned* to) {
    const uint4* at = from + 2048ull * blockIdx.x + threadIdx.x;
    uint4 x[8];
    unsigned sum = 0;
    #pragma unroll
    for (int i = 0; i < 8; i++) x[i] = __ldcs(at + 256 * i);
    #pragma unroll
    for (int i = 0; i < 8; i++) sum += x[i].x ^ x[i].y ^ x[i].z ^ x[i].w;
    // Never, but the compiler cannot know.
    if (sum == 0x5eed5eedu) *to = sum;
}"#;

/// Bytes per second of the driver's own copy, read and written ones, and of a kernel that only reads; `None` where the
/// device is not CUDA.
pub fn rates(device: &Device, bytes: usize) -> Option<[f64; 2]> {
    let (context, stream) = device.as_cuda()?;
    let timer = device.cuda_timer(1).unwrap()?;
    let from = stream.alloc_zeros::<u8>(bytes).unwrap();
    let mut to = stream.alloc_zeros::<u8>(bytes).unwrap();
    let best = |mut work: Box<dyn FnMut() + '_>| (0..10).map(|_| seconds(&timer, &mut work)).fold(f64::MAX, f64::min);
    let copy = best(Box::new(|| stream.memcpy_dtod(&from, &mut to).unwrap()));
    let kernel = context.load_module(compile_ptx(READ).unwrap()).unwrap().load_function("read_all").unwrap();
    let grid = LaunchConfig { grid_dim: ((bytes / 32768) as u32, 1, 1), block_dim: (256, 1, 1), shared_mem_bytes: 0 };
    let read = best(Box::new(|| {
        // SAFETY: every index is below the length, a multiple of what one block reads.
        unsafe { stream.launch_builder(&kernel).arg(&from).arg(&mut to).launch(grid).unwrap() };
    }));
    Some([2.0 * bytes as f64 / copy, bytes as f64 / read])
}
