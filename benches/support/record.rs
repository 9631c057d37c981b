//! Figures, and where they came from.

use super::data::Problem;
use serde::Serialize;
use softhash::{Device, wgpu};
use std::time::Instant;

#[derive(Clone, Serialize)]
pub struct Record {
    pub scoring: String,
    pub stage: String,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub keys: usize,
    /// Bytes that must move at least; 0 where that is not the measure of the stage.
    pub bytes: u64,
    pub median_seconds: f64,
    pub least_seconds: f64,
    pub samples: usize,
    pub bytes_per_second: f64,
    /// Of the measured copy.
    pub fraction_of_copy: f64,
}

impl Record {
    pub fn new(scoring: &str, stage: &str, problem: &Problem, bytes: u64) -> Self {
        Self {
            scoring: scoring.into(),
            stage: stage.into(),
            q_heads: problem.q_heads,
            kv_heads: problem.kv_heads,
            head_dim: problem.head_dim,
            keys: problem.keys,
            bytes,
            median_seconds: 0.0,
            least_seconds: 0.0,
            samples: 0,
            bytes_per_second: 0.0,
            fraction_of_copy: 0.0,
        }
    }

    pub fn group(&self) -> String {
        format!("{} {}q{}kv d{}", self.scoring, self.q_heads, self.kv_heads, self.head_dim)
    }
}

#[derive(Serialize)]
pub struct Run {
    device: String,
    backend: String,
    driver: String,
    checked: bool,
    commit: String,
    unix_time: u64,
    copy_bytes_per_second: f64,
    records: Vec<Record>,
    #[serde(skip)]
    filter: Option<String>,
}

fn commit() -> String {
    // Baked in where the executable is carried to a machine without the repository.
    if let Some(commit) = option_env!("SOFTHASH_COMMIT") {
        return commit.into();
    }
    let git = std::process::Command::new("git").args(["rev-parse", "--short", "HEAD"]).output();
    git.ok().and_then(|o| String::from_utf8(o.stdout).ok()).map_or("unknown".into(), |s| s.trim().into())
}

impl Run {
    pub fn new(device: &Device, filter: Option<String>) -> Self {
        let report = device.report();
        let gpu = report.gpu.as_ref();
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            device: gpu.map_or_else(|| format!("CPU, {} threads", report.threads), |g| g.adapter.clone()),
            backend: gpu.map_or("cpu".into(), |g| g.backend.clone()),
            driver: gpu.map_or(String::new(), |g| g.driver.clone()),
            checked: gpu.is_some_and(|g| g.checked),
            commit: commit(),
            unix_time: now.map_or(0, |d| d.as_secs()),
            copy_bytes_per_second: 0.0,
            records: Vec::new(),
            filter,
        }
    }

    pub fn wanted(&self, record: &Record) -> bool {
        let name = format!("{} {}", record.group(), record.stage);
        self.filter.as_ref().is_none_or(|f| name.contains(f))
    }

    /// The ceiling: a large copy on the same device, bytes read plus bytes written.
    pub fn measure_copy(&mut self, device: &Device) -> f64 {
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
        self.copy_bytes_per_second = best;
        best
    }

    pub fn add(&mut self, mut record: Record, mut samples: Vec<f64>) {
        if samples.is_empty() || !self.wanted(&record) {
            return;
        }
        samples.sort_by(f64::total_cmp);
        record.samples = samples.len();
        record.least_seconds = samples[0];
        record.median_seconds = samples[samples.len() / 2];
        record.bytes_per_second = record.bytes as f64 / record.median_seconds;
        record.fraction_of_copy = record.bytes_per_second / self.copy_bytes_per_second;
        self.records.push(record);
    }

    pub fn print(&self) {
        println!("\n{} {} {} commit {}", self.device, self.backend, self.driver, self.commit);
        println!("| heads | D | keys | scoring | stage | median µs | least µs | GB/s | of copy |");
        println!("|---|---|---|---|---|---|---|---|---|");
        for r in &self.records {
            let rate = if r.bytes == 0 {
                "| | |".into()
            } else {
                format!("| {:.1} | {:.2} |", r.bytes_per_second * 1e-9, r.fraction_of_copy)
            };
            let (median, least) = (r.median_seconds * 1e6, r.least_seconds * 1e6);
            let heads = format!("{}/{}", r.q_heads, r.kv_heads);
            println!(
                "| {heads} | {} | {} | {} | {} | {median:.1} | {least:.1} {rate}",
                r.head_dim, r.keys, r.scoring, r.stage
            );
        }
    }

    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap()
    }
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
