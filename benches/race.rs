//! Times of RACE forward, backward and by the step, beside our own exact attention and a measured copy.
//!
//! ```text
//! cargo bench --bench race -- [--device auto|cpu|NAME] [--lengths 65536,1048576] [--hashes 2x2,3x3,4x4]
//!                             [--dtypes f32,bf16] [--dense 1024,4096] [--stages] [--json FILE] [FILTER]
//! ```
//! The executable runs without cargo. Every result is checked against sums in f64 over all tokens before it is timed; a
//! wrong one ends the run. Up to `--segment` tokens one call does all; beyond, the state is carried from call to call,
//! and the same resident tensors stand for every segment. Times on a GPU are between two marks on its own clock, before
//! the first command and after the last, so a GPU that waits for the host shows; without such a clock, and on the CPU,
//! they are wall time, and the table says so.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../examples/common/counter.rs"]
mod counter;
#[path = "../examples/common/counter_gpu.rs"]
mod counter_gpu;
#[cfg(feature = "cuda")]
#[path = "support/cuda.rs"]
mod cuda;
#[path = "support/origin.rs"]
mod origin;
#[path = "support/race_layer.rs"]
mod race_layer;
#[path = "support/race_record.rs"]
mod race_record;
#[path = "../examples/common/race_truth.rs"]
mod race_truth;

use clap::Parser;
use race_layer::{Layer, Size, Tensors, dense};
use race_record::{Record, Run};
use softhash::{DType, Device, Timer, wgpu};
use std::time::Instant;

#[derive(Parser)]
struct Arguments {
    /// `cpu`, `auto`, or part of a GPU adapter's name.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Tokens, up to 12582912 and beyond.
    #[arg(long, value_delimiter = ',', default_value = "65536,262144")]
    lengths: Vec<u64>,
    /// P and L, as 2x2.
    #[arg(long, value_delimiter = ',', default_value = "2x2,3x3,4x4")]
    hashes: Vec<String>,
    /// f32, bf16.
    #[arg(long, value_delimiter = ',', default_value = "f32,bf16")]
    dtypes: Vec<String>,
    /// Lengths at which exact attention runs too, to find where RACE overtakes it; none leaves that out.
    #[arg(long, value_delimiter = ',', num_args = 0.., default_value = "512,1024,2048,4096,8192")]
    dense: Vec<u64>,
    /// Query, key and value heads.
    #[arg(long, default_value_t = 4)]
    heads: usize,
    #[arg(long, default_value_t = 128)]
    head_dim: usize,
    /// Tokens of a call at most; 65536 on the CPU and 262144 on a GPU by default.
    #[arg(long)]
    segment: Option<u64>,
    /// Seconds of measuring per figure, after one run that is not counted.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// Also the time of each kernel.
    #[arg(long)]
    stages: bool,
    /// Where every figure goes.
    #[arg(long)]
    json: Option<std::path::PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
    /// Only benches whose name holds this.
    filter: Option<String>,
}

/// Measures on the device's clock where it has one.
pub struct Clock {
    device: Device,
    timer: Option<Timer>,
    #[cfg(feature = "cuda")]
    cuda: Option<softhash::CudaTimer>,
    seconds: f64,
}

impl Clock {
    fn submit(&self, record: impl FnOnce(&Timer, &mut wgpu::CommandEncoder)) {
        if let (Some((gpu, queue)), Some(timer)) = (self.device.as_wgpu(), &self.timer) {
            let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            record(timer, &mut encoder);
            queue.submit([encoder.finish()]);
        }
    }

    /// Seconds of one run, and whether they are the GPU's.
    fn once(&self, run: &mut dyn FnMut()) -> (f64, bool) {
        #[cfg(feature = "cuda")]
        if let Some(timer) = &self.cuda {
            return (cuda::seconds(timer, run), true);
        }
        self.wait();
        self.submit(|timer, encoder| timer.begin(encoder, 0));
        let start = Instant::now();
        run();
        self.submit(|timer, encoder| {
            timer.end(encoder, 0);
            timer.resolve(encoder);
        });
        self.wait();
        let wall = start.elapsed().as_secs_f64();
        let own = self.timer.as_ref().and_then(|timer| timer.read_blocking().unwrap()[0]);
        own.map_or((wall, false), |nanoseconds| (nanoseconds * 1e-9, true))
    }

    fn wait(&self) {
        if let Some((gpu, _)) = self.device.as_wgpu() {
            gpu.poll(wgpu::PollType::wait_indefinitely()).unwrap();
        }
    }

    /// Runs once uncounted, then at least three times and for as long as was asked for.
    pub fn measure(&self, run: &mut Run, mut record: Record, mut work: impl FnMut()) -> f64 {
        if !run.wanted(&record) {
            return f64::NAN;
        }
        self.once(&mut work);
        let (mut samples, start) = (Vec::new(), Instant::now());
        while samples.len() < 3 || (start.elapsed().as_secs_f64() < self.seconds && samples.len() < 1000) {
            let (seconds, own) = self.once(&mut work);
            record.clock = if own { "gpu" } else { "wall" };
            samples.push(seconds);
        }
        run.add(record, samples)
    }
}

/// Prints the time of each kernel in a forward and a backward. Without wgpu there are none.
fn stages(device: &Device, name: &str, layer: &mut Layer<'_>) {
    for backward in [false, true] {
        device.trace_stages(true);
        layer.once(backward);
        let stages = device.trace_stages(false);
        let total: f64 = stages.iter().map(|(_, _, nanoseconds)| nanoseconds).sum();
        println!("{name} {}: {:.2} ms", if backward { "backward" } else { "forward" }, total * 1e-6);
        for (stage, count, nanoseconds) in stages {
            println!("  {stage:20} {count:6} x {:8.1} us", nanoseconds * 1e-3 / count as f64);
        }
    }
}

fn pair(hash: &str) -> (usize, usize) {
    let (planes, tables) = hash.split_once('x').expect("a hash is given as 2x2");
    (planes.parse().unwrap(), tables.parse().unwrap())
}

fn main() {
    let arguments = Arguments::parse();
    let device = match arguments.device.as_str() {
        "auto" => Device::auto().unwrap(),
        name => Device::by_name(name).unwrap(),
    };
    println!("{}", device.report());
    let mut run = Run::new(&device, arguments.filter.clone());
    let clock = Clock {
        device: device.clone(),
        timer: device.timer(1).unwrap(),
        #[cfg(feature = "cuda")]
        cuda: device.cuda_timer(1).unwrap(),
        seconds: arguments.seconds,
    };
    let segment = arguments.segment.unwrap_or(if device.is_cpu() { 1 << 16 } else { 1 << 18 });
    for dtype in &arguments.dtypes {
        let dtype = match dtype.as_str() {
            "f32" => DType::F32,
            "bf16" => DType::Bf16,
            other => panic!("no dtype is called {other:?}"),
        };
        let size = |tokens| Size { tokens, segment, heads: arguments.heads, channels: arguments.head_dim, dtype };
        for &tokens in &arguments.lengths {
            let tensors = Tensors::new(&device, size(tokens));
            for hash in &arguments.hashes {
                let mut layer = Layer::new(&device, &tensors, pair(hash));
                layer.check(true);
                layer.forward(&clock, &mut run);
                layer.backward(&clock, &mut run);
                if arguments.stages {
                    stages(&device, &format!("{dtype:?} {hash} {tokens} tokens"), &mut layer);
                }
            }
        }
        for hash in &arguments.hashes {
            let tensors = Tensors::new(&device, size(1));
            Layer::new(&device, &tensors, pair(hash)).step(&clock, &mut run);
        }
        let mut crossings = vec![None; arguments.hashes.len()];
        for &tokens in &arguments.dense {
            let tensors = Tensors::new(&device, size(tokens));
            let exact = dense(&device, &tensors, &clock, &mut run);
            for (hash, crossing) in arguments.hashes.iter().zip(&mut crossings) {
                let mut layer = Layer::new(&device, &tensors, pair(hash));
                layer.check(false);
                if layer.forward(&clock, &mut run) < exact && crossing.is_none() {
                    *crossing = Some(tokens);
                }
            }
        }
        for (hash, crossing) in arguments.hashes.iter().zip(crossings).filter(|_| !arguments.dense.is_empty()) {
            let at = crossing.map_or("at none of the lengths".into(), |tokens| format!("at {tokens} tokens"));
            run.say(format!("{dtype:?}, RACE {hash}: forward first faster than exact attention {at}"));
        }
    }
    run.print();
    if let Some(path) = &arguments.json {
        std::fs::write(path, run.json()).unwrap();
    }
}
