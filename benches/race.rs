//! Times of RACE forward, backward and by the step, beside our own exact attention and a measured copy.
//!
//! ```text
//! cargo bench --bench race -- [--device auto|cpu|NAME] [--lengths 65536,1048576] [--hashes 2x2,3x3,4x4]
//!                             [--dtypes f32,bf16] [--windows 0,256] [--narrow] [--dense 1024,4096] [--stages]
//!                             [--json FILE] [FILTER]
//! ```
//! The executable runs without cargo. Every result is checked against sums in f64 over all tokens before it is timed; a
//! wrong one ends the run. Up to `--segment` tokens one call does all; beyond, the state is carried from call to call,
//! and the same resident tensors stand for every segment. Times on a GPU are between two marks on its own clock, before
//! the first command and after the last, so a GPU that waits for the host shows; without such a clock, and on the CPU,
//! they are wall time, and the table says so.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/mod.rs"]
mod support;

use clap::Parser;
use softhash::{DType, Device};
use support::clock::{Clock, Patience, samples};
use support::outcome::Outcome;
use support::race_dense::dense;
use support::race_layer::{Layer, Size, Tensors, Truths, name};
use support::race_record::{Record, Run};
use support::race_step::Steps;

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
    /// Tokens of the exact window beside RACE; 0 for none.
    #[arg(long, value_delimiter = ',', default_value = "0")]
    windows: Vec<usize>,
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
    /// Gradients of q, k and v in the inputs' type where one call gives them all, in place of f32.
    #[arg(long)]
    narrow: bool,
    /// Seconds of measuring per figure, after runs that are not counted.
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

/// Measures into a table.
struct Meter {
    run: Run,
    clock: Clock,
    patience: Patience,
}

impl Meter {
    /// Runs uncounted, then as often as was asked for; the median.
    fn add(&mut self, mut record: Record, mut once: impl FnMut(&Clock) -> Outcome<f64>) -> f64 {
        if !self.run.wanted(&record) {
            return f64::NAN;
        }
        let seconds =
            samples(self.patience, &self.clock, || once(&self.clock)).unwrap_or_else(|error| panic!("{error}"));
        record.clock = self.clock.name();
        self.run.add(record, seconds)
    }

    fn forward(&mut self, layer: &mut Layer) -> f64 {
        let record = Record::new(layer.name(), "forward", &layer.size(), layer.bytes(false));
        self.add(record, |clock| clock.once(|| layer.forward(|_, _| Ok(()))))
    }

    fn backward(&mut self, layer: &mut Layer) -> f64 {
        let record = Record::new(layer.name(), "backward", &layer.size(), layer.bytes(true));
        self.add(record, |clock| clock.once(|| layer.backward(|_, _| Ok(()))))
    }
}

/// Prints the time of each kernel in a forward and a backward, which wgpu alone tells.
fn stages(device: &Device, name: &str, layer: &mut Layer<'_>) {
    if device.as_wgpu().is_none() {
        return println!("{name}: no times of single kernels on this device");
    }
    for backward in [false, true] {
        device.trace_stages(true);
        let passed = if backward { layer.backward(|_, _| Ok(())) } else { layer.forward(|_, _| Ok(())) };
        passed.unwrap_or_else(|error| panic!("{error}"));
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
    let run = Run::new(&device, arguments.filter.clone());
    let patience = Patience::new(&device, arguments.seconds);
    let mut meter = Meter { run, clock: Clock::new(&device).unwrap(), patience };
    let mut truths = Truths::default();
    let segment = arguments.segment.unwrap_or(if device.is_cpu() { 1 << 16 } else { 1 << 18 });
    let mut layers = Vec::new();
    for hash in &arguments.hashes {
        layers.extend(arguments.windows.iter().map(|&window| (pair(hash), window)));
    }
    for dtype in &arguments.dtypes {
        let dtype = match dtype.as_str() {
            "f32" => DType::F32,
            "bf16" => DType::Bf16,
            other => panic!("no dtype is called {other:?}"),
        };
        let (heads, channels) = (arguments.heads, arguments.head_dim);
        let size = |tokens| Size { tokens, segment, heads, channels, dtype };
        for &tokens in &arguments.lengths {
            let tensors = Tensors::new(&device, size(tokens)).unwrap();
            for &(hash, window) in &layers {
                let gradients = if arguments.narrow { dtype } else { DType::F32 };
                let mut layer = Layer::new(&device, &tensors, hash, window).unwrap().gradients(gradients);
                layer.check(&mut truths, true).unwrap_or_else(|error| panic!("{error}"));
                meter.forward(&mut layer);
                meter.backward(&mut layer);
                if arguments.stages {
                    stages(&device, &format!("{dtype:?} {} {tokens} tokens", layer.name()), &mut layer);
                }
            }
        }
        for &(hash, window) in &layers {
            let mut steps = Steps::new(&device, (heads, channels, dtype), 1, hash, window).unwrap();
            steps.check().unwrap_or_else(|error| panic!("{error}"));
            let record = Record::new(&name(hash, window), "step", &size(1), steps.bytes());
            let clock = Clock::new(&device).unwrap();
            let mut step = steps.step(&clock).unwrap();
            meter.add(record, |_| (step.seconds)());
        }
        let mut crossings = vec![None; arguments.hashes.len()];
        for &tokens in &arguments.dense {
            let tensors = Tensors::new(&device, size(tokens)).unwrap();
            let exact = dense(&device, &tensors, |record, work| {
                meter.add(record, |clock| {
                    clock.once(|| {
                        work();
                        Ok(())
                    })
                })
            });
            for (hash, crossing) in arguments.hashes.iter().zip(&mut crossings) {
                let mut layer = Layer::new(&device, &tensors, pair(hash), 0).unwrap();
                layer.check(&mut truths, false).unwrap_or_else(|error| panic!("{error}"));
                if meter.forward(&mut layer) < exact && crossing.is_none() {
                    *crossing = Some(tokens);
                }
            }
        }
        for (hash, crossing) in arguments.hashes.iter().zip(crossings).filter(|_| !arguments.dense.is_empty()) {
            let at = crossing.map_or("at none of the lengths".into(), |tokens| format!("at {tokens} tokens"));
            meter.run.say(format!("{dtype:?}, RACE {hash}: forward first faster than exact attention {at}"));
        }
    }
    meter.run.print();
    if let Some(path) = &arguments.json {
        std::fs::write(path, meter.run.json()).unwrap();
    }
}
