//! What a device can move at most.

use super::clock::timer;
use softhash::{Device, wgpu};
use std::time::Instant;

const TIMES: usize = 10;

/// Bytes per second of a large copy, read and written ones, and of a large read.
pub fn measure(device: &Device) -> [f64; 2] {
    #[cfg(feature = "cuda")]
    if let Some(rates) = super::cuda::rates(device, 1 << 29) {
        return rates;
    }
    let small = device.is_cpu() || device.report().gpu.is_some_and(|g| g.software);
    let bytes: u64 = if small { 64 << 20 } else { 1 << 29 };
    match device.as_wgpu() {
        Some((gpu, queue)) => [(COPY, 2.0), ("read_all", 1.0)]
            .map(|(kernel, times)| times * bytes as f64 / gpu_seconds(device, gpu, queue, kernel, bytes)),
        None => host(bytes as usize),
    }
}

fn best(mut seconds: impl FnMut() -> f64) -> f64 {
    (0..TIMES).map(|_| seconds()).fold(f64::MAX, f64::min)
}

fn host(bytes: usize) -> [f64; 2] {
    use rayon::prelude::*;
    let source: Vec<u64> = (0..bytes as u64 / 8).collect();
    let mut target = vec![0u64; bytes / 8];
    let copy = best(|| {
        let begin = Instant::now();
        target.par_chunks_mut(1 << 17).zip(source.par_chunks(1 << 17)).for_each(|(t, s)| t.copy_from_slice(s));
        begin.elapsed().as_secs_f64()
    });
    let read = best(|| {
        let begin = Instant::now();
        let sum = source.par_chunks(1 << 17).map(|s| s.iter().fold(0u64, |sum, x| sum.wrapping_add(*x))).sum::<u64>();
        std::hint::black_box(sum);
        begin.elapsed().as_secs_f64()
    });
    [2.0 * bytes as f64 / copy, bytes as f64 / read]
}

const COPY: &str = "copy_all";
/// What lies at the end of what is copied or read.
const MARK: [u32; 4] = [0x5eed_5eed, 0, 0, 0];

/// By compute shaders, which show what a kernel can move; a driver's buffer copy may take a slower engine.
const SHADER: &str = "
    @group(0) @binding(0) var<storage, read> a: array<vec4<u32>>;
    @group(0) @binding(1) var<storage, read_write> b: array<vec4<u32>>;
    @compute @workgroup_size(256)
    fn copy_all(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) i: u32) {
        let at = g.x * 1024u + i;
        let x = a[at]; let y = a[at + 256u]; let z = a[at + 512u]; let w = a[at + 768u];
        b[at] = x; b[at + 256u] = y; b[at + 512u] = z; b[at + 768u] = w;
    }
    @compute @workgroup_size(256)
    fn read_all(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) i: u32) {
        let at = g.x * 1024u + i;
        let x = a[at] ^ a[at + 256u] ^ a[at + 512u] ^ a[at + 768u];
        // Of one marked place, but the compiler cannot know.
        if (x.x + x.y + x.z + x.w == 0x5eed5eedu) { b[0] = x; }
    }";

/// Seconds of one pass over buffers of `bytes`, the least of some.
fn gpu_seconds(device: &Device, gpu: &wgpu::Device, queue: &wgpu::Queue, kernel: &str, bytes: u64) -> f64 {
    let buffer = |size, usage| {
        gpu.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
    };
    let (storage, copied) = (wgpu::BufferUsages::STORAGE, wgpu::BufferUsages::COPY_SRC);
    let (from, to) = (buffer(bytes, storage | wgpu::BufferUsages::COPY_DST), buffer(bytes, storage | copied));
    queue.write_buffer(&from, bytes - 16, bytemuck::cast_slice(&MARK));
    let descriptor = wgpu::ShaderModuleDescriptor { label: None, source: wgpu::ShaderSource::Wgsl(SHADER.into()) };
    // SAFETY: every index is below the buffers' length, which is a multiple of what one workgroup moves.
    let module = unsafe { gpu.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
    let pipeline = gpu.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: None,
        module: &module,
        entry_point: Some(kernel),
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    let entries = [(0, &from), (1, &to)]
        .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
    let layout = pipeline.get_bind_group_layout(0);
    let group = gpu.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries: &entries });
    let timer = timer(device).unwrap();
    let least = best(|| {
        let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        if let Some(timer) = &timer {
            timer.begin(&mut encoder, 0);
        }
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline);
            pass.set_bind_group(0, &group, &[]);
            pass.dispatch_workgroups((bytes / 16384) as u32, 1, 1);
        }
        if let Some(timer) = &timer {
            timer.end(&mut encoder, 0);
            timer.resolve(&mut encoder);
        }
        let begin = Instant::now();
        queue.submit([encoder.finish()]);
        gpu.poll(wgpu::PollType::wait_indefinitely()).unwrap();
        let wall = begin.elapsed().as_secs_f64();
        timer.as_ref().and_then(|t| t.read_blocking().unwrap()[0]).map_or(wall, |ns| ns * 1e-9)
    });
    // A kernel that did not run moves as many bytes as one likes.
    let staging = buffer(16, wgpu::BufferUsages::COPY_DST | wgpu::BufferUsages::MAP_READ);
    let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
    encoder.copy_buffer_to_buffer(&to, if kernel == COPY { bytes - 16 } else { 0 }, &staging, 0, 16);
    queue.submit([encoder.finish()]);
    staging.map_async(wgpu::MapMode::Read, .., |_| ());
    gpu.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let found = staging.get_mapped_range(..).unwrap().to_vec();
    assert_eq!(found, bytemuck::cast_slice::<u32, u8>(&MARK), "{kernel} did not run");
    least
}
