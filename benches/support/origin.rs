//! Where figures come from, and what the device can move at most.

use serde::Serialize;
use softhash::{Device, wgpu};
use std::time::Instant;

/// Device, driver, commit and time of a run, and the ceiling that its figures are held against.
#[derive(Serialize)]
pub struct Origin {
    pub device: String,
    pub backend: String,
    pub driver: String,
    pub checked: bool,
    pub commit: String,
    pub unix_time: u64,
    pub copy_bytes_per_second: f64,
}

fn commit() -> String {
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
            Some(cuda) => (cuda.adapter.clone(), "CUDA".into(), format!("CUDA {}, NVRTC {}", cuda.driver, cuda.nvrtc)),
            None => (device_name, backend, driver),
        };
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let copy_bytes_per_second = measure_copy(device);
        println!("copy: {:.1} GB/s, read and written bytes counted", copy_bytes_per_second * 1e-9);
        Self {
            device: device_name,
            backend,
            driver,
            checked: report.gpu.is_some_and(|g| g.checked),
            commit: commit(),
            unix_time: now.map_or(0, |d| d.as_secs()),
            copy_bytes_per_second,
        }
    }

    pub fn print(&self) {
        println!("\n{} {} {} commit {}", self.device, self.backend, self.driver, self.commit);
    }
}

/// The ceiling: a large copy on the same device, bytes read plus bytes written.
fn measure_copy(device: &Device) -> f64 {
    #[cfg(feature = "cuda")]
    if let Some(rate) = super::cuda::copy_rate(device, 1 << 29) {
        return rate;
    }
    let bytes: u64 =
        if device.is_cpu() || device.report().gpu.is_some_and(|g| g.software) { 64 << 20 } else { 1 << 29 };
    let mut best = 0f64;
    if let Some((gpu, queue)) = device.as_wgpu() {
        let copy = CopyKernel::new(gpu, bytes);
        let timer = device.timer(1).unwrap();
        for _ in 0..10 {
            let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            if let Some(timer) = &timer {
                timer.begin(&mut encoder, 0);
            }
            copy.record(&mut encoder);
            if let Some(timer) = &timer {
                timer.end(&mut encoder, 0);
                timer.resolve(&mut encoder);
            }
            let begin = Instant::now();
            queue.submit([encoder.finish()]);
            gpu.poll(wgpu::PollType::wait_indefinitely()).unwrap();
            let wall = begin.elapsed().as_secs_f64();
            let clock = timer.as_ref().and_then(|t| t.read_blocking().unwrap()[0]).map(|ns| ns * 1e-9);
            best = best.max(2.0 * bytes as f64 / clock.unwrap_or(wall));
        }
    } else {
        use rayon::prelude::*;
        let source = vec![1u8; bytes as usize];
        let mut target = vec![0u8; bytes as usize];
        for _ in 0..10 {
            let begin = Instant::now();
            target.par_chunks_mut(1 << 20).zip(source.par_chunks(1 << 20)).for_each(|(t, s)| t.copy_from_slice(s));
            best = best.max(2.0 * bytes as f64 / begin.elapsed().as_secs_f64());
        }
    }
    best
}

/// A copy by a compute shader: what a kernel can move; a driver's buffer copy may take a slower engine.
struct CopyKernel {
    pipeline: wgpu::ComputePipeline,
    group: wgpu::BindGroup,
    workgroups: u32,
}

impl CopyKernel {
    fn new(gpu: &wgpu::Device, bytes: u64) -> Self {
        let make = || {
            let (size, usage) = (bytes, wgpu::BufferUsages::STORAGE);
            gpu.create_buffer(&wgpu::BufferDescriptor { label: None, size, usage, mapped_at_creation: false })
        };
        let (from, to) = (make(), make());
        let source = "
            @group(0) @binding(0) var<storage, read> a: array<vec4<u32>>;
            @group(0) @binding(1) var<storage, read_write> b: array<vec4<u32>>;
            @compute @workgroup_size(256)
            fn main(@builtin(workgroup_id) g: vec3<u32>, @builtin(local_invocation_index) i: u32) {
                let at = g.x * 1024u + i;
                let x = a[at]; let y = a[at + 256u]; let z = a[at + 512u]; let w = a[at + 768u];
                b[at] = x; b[at + 256u] = y; b[at + 512u] = z; b[at + 768u] = w;
            }";
        let descriptor = wgpu::ShaderModuleDescriptor { label: None, source: wgpu::ShaderSource::Wgsl(source.into()) };
        // SAFETY: every index is below the buffers' length, which is a multiple of what one workgroup copies.
        let module = unsafe { gpu.create_shader_module_trusted(descriptor, wgpu::ShaderRuntimeChecks::unchecked()) };
        let pipeline = gpu.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: None,
            layout: None,
            module: &module,
            entry_point: None,
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let entries = [(0, &from), (1, &to)]
            .map(|(binding, buffer)| wgpu::BindGroupEntry { binding, resource: buffer.as_entire_binding() });
        let layout = pipeline.get_bind_group_layout(0);
        let group =
            gpu.create_bind_group(&wgpu::BindGroupDescriptor { label: None, layout: &layout, entries: &entries });
        Self { pipeline, group, workgroups: (bytes / 16384) as u32 }
    }

    fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.group, &[]);
        pass.dispatch_workgroups(self.workgroups, 1, 1);
    }
}
