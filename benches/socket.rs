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

#[path = "support/mod.rs"]
mod support;

use clap::Parser;
use criterion::{BenchmarkId, Criterion, Throughput};
use softhash::{DecodeOptions, Device, Mode, SocketCache};
use std::collections::HashSet;
use std::time::Duration;
use support::clock::{Clock, Patience, raise_clocks};
use support::data::{CHUNK, Problem};
use support::record::{Record, Run};
use support::step::{step, wall};
use support::{judge, resident, scorings};

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
            let mut problem = Problem::new(q, kv, arguments.head_dim, keys);
            for name in &arguments.scorings {
                bench(&mut criterion, &mut run, &device, &mut problem, name);
            }
        }
    }
    run.print();
    if let Some(path) = &arguments.json {
        std::fs::write(path, run.json()).unwrap();
    }
}

fn bench(criterion: &mut Criterion, run: &mut Run, device: &Device, problem: &mut Problem, name: &str) {
    let config = scorings::config(name).unwrap_or_else(|| panic!("no scoring is called {name:?}"));
    let mut cache = SocketCache::new(device, config, problem.shape(), 1).unwrap();
    cache.reserve(problem.keys()).unwrap();
    let append = problem.fill(&mut cache);
    let mode = if name == "dense" { Mode::Dense } else { Mode::Sparse };
    let options = DecodeOptions { mode, ..DecodeOptions::default() };
    let selected = judge::check(&mut cache, problem, &options).unwrap_or_else(|error| panic!("{error}"));
    let problem = &*problem;
    let bytes = cache.least_bytes((mode == Mode::Sparse).then_some(selected as u64));
    let record = |stage: &str, bytes: u64| Record::new(name, stage, problem, bytes);

    // Stages, each by its own passes: their sum exceeds the step by the gaps between passes.
    let Ok(stages) = cache.profile_with(&problem.query(), &options) else { return };
    let mut names: Vec<&'static str> = stages.iter().map(|s| s.stage).collect();
    // A cache in several pieces of memory has some stages several times.
    let mut seen = HashSet::new();
    names.retain(|stage| seen.insert(*stage));
    // The last appends' staging memory goes back to the driver first; that costs the steps meanwhile.
    for _ in 0..20 {
        wall(&mut cache, &problem.query(), &options).unwrap();
    }
    let clock = Clock::new(device).unwrap();
    let patience = Patience::new(device, 0.0);
    let query = resident::resident(device, problem.query_tensor().unwrap()).unwrap();
    let settle = |cache: &mut SocketCache| {
        if device.as_wgpu().is_none() {
            return;
        }
        let mut steps = step(device, &clock, std::slice::from_mut(cache), &query, options).unwrap();
        raise_clocks(patience, &clock, || (steps.seconds)()).unwrap();
    };
    for stage in names {
        settle(&mut cache);
        let bytes = match stage {
            "score" => bytes.index,
            "attend" => bytes.rows,
            _ => 0,
        };
        measure(criterion, run, record(stage, bytes), || {
            let stages = cache.profile_with(&problem.query(), &options).unwrap();
            stages.iter().filter(|s| s.stage == stage).map(|s| s.nanoseconds * 1e-9).sum()
        });
    }
    settle(&mut cache);
    let mut steps = step(device, &clock, std::slice::from_mut(&mut cache), &query, options).unwrap();
    measure(criterion, run, record("step", bytes.total()), || (steps.seconds)().unwrap());
    drop(steps);
    if !device.is_cpu() {
        measure(criterion, run, record("wall", bytes.total()), || {
            wall(&mut cache, &problem.query(), &options).unwrap()
        });
        run.add(record("append per 64K tokens", cache.append_bytes(CHUNK as u64)), append);
    }
}
