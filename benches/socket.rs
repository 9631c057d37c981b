//! Times of SOCKET decoding by stage and whole, beside dense decoding and a measured copy.
//!
//! ```text
//! cargo bench --bench socket -- [--device auto|cpu|NAME] [--lengths 4096,16384] [--heads 32/8]
//!                               [--scorings dense,socket,sign128,...] [--json FILE] [FILTER]
//! ```
//! The executable runs without cargo. Every result is checked against attention computed on the host before it is
//! timed; a wrong one ends the run. On a GPU times come from its own timestamps: a step is one submission, stages are
//! passes of their own, and host wall time with a wait is given apart. On CUDA (feature `cuda`) a step is the replay of a
//! graph. On the CPU times are the host's.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[cfg(feature = "cuda")]
#[path = "support/cuda.rs"]
mod cuda;
#[path = "support/data.rs"]
mod data;
#[path = "support/judge.rs"]
mod judge;
#[path = "support/origin.rs"]
mod origin;
#[path = "support/record.rs"]
mod record;
#[cfg(feature = "cuda")]
#[path = "support/replay.rs"]
mod replay;

use clap::Parser;
use criterion::{BenchmarkId, Criterion, Throughput};
use data::Problem;
use record::{Record, Run};
use softhash::{Attended, DecodeOptions, Device, Mode, Scoring, SelectionScope, SocketCache, SocketConfig, wgpu};
use std::time::{Duration, Instant};

#[derive(Parser)]
struct Arguments {
    /// `cpu`, `auto`, or part of a GPU adapter's name.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Key counts.
    #[arg(long, value_delimiter = ',', default_value = "4096,16384")]
    lengths: Vec<usize>,
    /// Query and key/value heads, as 32/8.
    #[arg(long, value_delimiter = ',', default_value = "32/8")]
    heads: Vec<String>,
    #[arg(long, default_value_t = 128)]
    head_dim: usize,
    /// What to run: dense, socket, sign128, sign128-group, hard.
    #[arg(long, value_delimiter = ',', default_value = "dense,socket,sign128,sign128-group")]
    scorings: Vec<String>,
    /// Seconds of measuring per figure.
    #[arg(long, default_value_t = 0.5)]
    seconds: f64,
    /// Where every figure goes.
    #[arg(long)]
    json: Option<std::path::PathBuf>,
    /// Given by cargo.
    #[arg(long, hide = true)]
    bench: bool,
    /// Only benches whose name holds this.
    filter: Option<String>,
}

fn config(name: &str) -> SocketConfig {
    match name {
        "dense" | "socket" => SocketConfig::paper(),
        "sign128" => SocketConfig::fast(),
        "sign128-group" => SocketConfig { scope: SelectionScope::PerGroup, ..SocketConfig::fast() },
        "hard" => SocketConfig { scoring: Scoring::HardCollision, ..SocketConfig::paper() },
        other => panic!("no scoring is called {other:?}"),
    }
}

/// Seconds of one decode: by the GPU's clock where it has one, else by the host's.
fn step(
    device: &Device,
    timer: Option<&softhash::Timer>,
    cache: &mut SocketCache,
    problem: &Problem,
    options: &DecodeOptions,
) -> f64 {
    let timed = |cache: &mut SocketCache, timer: &softhash::Timer| -> Option<f64> {
        let (gpu, queue) = device.as_wgpu()?;
        let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        timer.begin(&mut encoder, 0);
        cache.decode_into(&mut encoder, &problem.query(), options).unwrap();
        timer.end(&mut encoder, 0);
        timer.resolve(&mut encoder);
        queue.submit([encoder.finish()]);
        timer.read_blocking().unwrap()[0].map(|ns| ns * 1e-9)
    };
    if let Some(timer) = timer
        && let Some(seconds) = timed(cache, timer)
    {
        return seconds;
    }
    wall(cache, problem, options)
}

/// Seconds of one decode from call to readable result.
fn wall(cache: &mut SocketCache, problem: &Problem, options: &DecodeOptions) -> f64 {
    let start = Instant::now();
    let Attended { lse, .. } = cache.decode_with(&problem.query(), options).unwrap();
    lse.read_blocking().unwrap();
    start.elapsed().as_secs_f64()
}

fn measure(criterion: &mut Criterion, run: &mut Run, record: Record, mut seconds: impl FnMut() -> f64) {
    if !run.wanted(&record) {
        return;
    }
    let mut samples = Vec::new();
    let mut group = criterion.benchmark_group(record.group());
    group.throughput(Throughput::Bytes(record.bytes));
    group.bench_function(BenchmarkId::new(&record.stage, record.keys), |bencher| {
        bencher.iter_custom(|iterations| {
            let mut total = 0.0;
            for _ in 0..iterations {
                let one = seconds();
                samples.push(one);
                total += one;
            }
            Duration::from_secs_f64(total.max(1e-9))
        });
    });
    group.finish();
    run.add(record, samples);
}

fn main() {
    let arguments = Arguments::parse();
    let device = match arguments.device.as_str() {
        "auto" => Device::auto().unwrap(),
        name => Device::by_name(name).unwrap(),
    };
    println!("{}", device.report());
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(100))
        .measurement_time(Duration::from_secs_f64(arguments.seconds));
    let mut run = Run::new(&device, arguments.filter.clone());

    for heads in &arguments.heads {
        let (q, kv) = heads.split_once('/').expect("heads are given as 32/8");
        let (q, kv) = (q.parse().unwrap(), kv.parse().unwrap());
        for &keys in &arguments.lengths {
            let problem = Problem::new(q, kv, arguments.head_dim, keys);
            for name in &arguments.scorings {
                bench(&mut criterion, &mut run, &device, &problem, name);
            }
        }
    }
    run.print();
    if let Some(path) = &arguments.json {
        std::fs::write(path, run.json()).unwrap();
    }
}

fn bench(criterion: &mut Criterion, run: &mut Run, device: &Device, problem: &Problem, name: &str) {
    let config = config(name);
    let mut cache = SocketCache::new(device, config.clone(), problem.shape(), 1).unwrap();
    cache.reserve(problem.keys).unwrap();
    let append = problem.fill(&mut cache);
    let mode = if name == "dense" { Mode::Dense } else { Mode::Sparse };
    let options = DecodeOptions { mode, ..DecodeOptions::default() };
    let selected = judge::check(&mut cache, problem, &options);
    let bytes = problem.bytes(&config, mode, selected);
    let record = |stage: &str, bytes: u64| Record::new(name, stage, problem, bytes);

    // Stages, each by its own passes: their sum exceeds the step by the gaps between passes.
    let Ok(stages) = cache.profile_with(&problem.query(), &options) else { return };
    let mut names: Vec<&'static str> = stages.iter().map(|s| s.stage).collect();
    names.dedup();
    // The last appends' staging memory goes back to the driver first; that costs the steps meanwhile.
    for _ in 0..20 {
        wall(&mut cache, problem, &options);
    }
    for stage in names {
        let bytes = match stage {
            "score" => bytes.score,
            "attend" => bytes.attend,
            _ => 0,
        };
        measure(criterion, run, record(stage, bytes), || {
            let stages = cache.profile_with(&problem.query(), &options).unwrap();
            stages.iter().filter(|s| s.stage == stage).map(|s| s.nanoseconds * 1e-9).sum()
        });
    }
    #[cfg(feature = "cuda")]
    if let Some(replay) = replay::replayed(device, &mut cache, problem, &options) {
        measure(criterion, run, record("step", bytes.step), replay);
        measure(criterion, run, record("wall", bytes.step), || wall(&mut cache, problem, &options));
        return run.add(record("append per 64K tokens", bytes.append), append);
    }
    let timer = device.timer(1).unwrap();
    measure(criterion, run, record("step", bytes.step), || step(device, timer.as_ref(), &mut cache, problem, &options));
    if !device.is_cpu() {
        measure(criterion, run, record("wall", bytes.step), || wall(&mut cache, problem, &options));
        run.add(record("append per 64K tokens", bytes.append), append);
    }
}
