//! Builds a long cache of synthetic keys, decodes with every way of attending, and prints how near each comes to exact
//! attention and how much it reads.
//!
//! `cargo run --release --example quickstart -- [--device auto|cpu|NAME] [--tokens N] [--steps N]`

#[path = "../common/device.rs"]
mod device;
#[path = "../common/progress.rs"]
mod progress;
#[path = "../common/synthetic.rs"]
mod synthetic;
#[path = "../common/table.rs"]
mod table;
mod truth;

use std::error::Error;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Parser;
use half::bf16;
use softhash::{
    Budget, CacheShape, DType, DecodeOptions, Device, Mode, Rule, Scoring, SocketCache, SocketConfig, TensorView,
};
use synthetic::{Shape, Stream};
use truth::{Nearness, Truth};

const SHAPE: Shape = Shape { q_heads: 8, kv_heads: 2, head_dim: 128 };
/// Tokens per append while the cache is built.
const CHUNK: usize = 1024;

#[derive(Parser)]
#[command(about = "Sparse against dense attention over a long synthetic cache")]
struct Args {
    /// What runs it: auto, cpu, or part of an adapter's name.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Tokens in the cache before the first step.
    #[arg(long, default_value_t = 32768, value_parser = clap::value_parser!(u32).range(2048..=1 << 20))]
    tokens: u32,
    /// Tokens to decode.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    steps: u32,
    /// Seed of the synthetic keys.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// One way of attending.
struct Contender {
    name: &'static str,
    config: SocketConfig,
    mode: Mode,
}

fn contenders() -> Vec<Contender> {
    let hard = SocketConfig {
        scoring: Scoring::HardCollision,
        rule: Rule::Disjoint,
        value_norm: false,
        ..SocketConfig::paper()
    };
    vec![
        // Dense attention reads no index; the smallest one keeps the cost of its upkeep out of the comparison.
        Contender { name: "dense", config: SocketConfig::fast(), mode: Mode::Dense },
        Contender { name: "SOCKET, L=60 P=8", config: SocketConfig::paper(), mode: Mode::Sparse },
        Contender { name: "SignProjection, 128 bits", config: SocketConfig::fast(), mode: Mode::Sparse },
        Contender { name: "hard LSH, L=60 P=8", config: hard, mode: Mode::Sparse },
    ]
}

/// What was measured of one contender.
struct Outcome {
    name: &'static str,
    /// `None` for the perfect selector, which is no way to run.
    cost: Option<Cost>,
    nearness: Nearness,
}

/// What one decode step takes.
#[derive(Clone, Copy)]
struct Cost {
    bytes_per_key: f64,
    step: Duration,
}

/// The truth of one decode step.
struct Step {
    q: Vec<bf16>,
    heads: Vec<Truth>,
    heavy: Vec<Vec<usize>>,
}

fn heavy_budget(config: &SocketConfig, visible: usize) -> usize {
    match config.budget {
        Budget::Tokens(m) => m,
        Budget::Ratio(r) => {
            ((visible as f64 * f64::from(r)).ceil() as usize).saturating_sub(config.sink + config.window)
        }
    }
}

/// Draws the queries of every step and attends exactly. The heavy keys are those that a perfect selector would take
/// beside sink and window.
fn steps(stream: &mut Stream, tokens: usize, count: usize) -> Vec<Step> {
    let config = SocketConfig::paper();
    (tokens..tokens + count)
        .map(|t| {
            let q = stream.query(t);
            let heads = truth::attend(stream, t + 1, &q);
            let budget = heavy_budget(&config, t + 1).max(1);
            let heavy = heads.iter().map(|h| h.heavy(config.sink..t + 1 - config.window, budget)).collect();
            Step { q, heads, heavy }
        })
        .collect()
}

/// k and v of `range`, as the views that `append` takes.
fn tokens_of(stream: &Stream, range: std::ops::Range<usize>) -> (TensorView<'_>, TensorView<'_>) {
    let row = SHAPE.kv_heads * SHAPE.head_dim;
    let shape = [1, range.len(), SHAPE.kv_heads, SHAPE.head_dim];
    let elements = range.start * row..range.end * row;
    (TensorView::bf16(&stream.k[elements.clone()], shape), TensorView::bf16(&stream.v[elements], shape))
}

fn build(
    device: &Device,
    config: &SocketConfig,
    stream: &Stream,
    tokens: usize,
    mut progress: impl FnMut(u64),
) -> softhash::Result<SocketCache> {
    let shape = CacheShape {
        num_q_heads: SHAPE.q_heads,
        num_kv_heads: SHAPE.kv_heads,
        head_dim: SHAPE.head_dim,
        value_dim: SHAPE.head_dim,
        dtype: DType::Bf16,
    };
    let mut cache = SocketCache::new(device, config.clone(), shape, 1)?;
    for start in (0..tokens).step_by(CHUNK) {
        let end = tokens.min(start + CHUNK);
        let (k, v) = tokens_of(stream, start..end);
        cache.append(&k, &v)?;
        progress((end - start) as u64);
    }
    Ok(cache)
}

/// Bytes that one step reads per key and kv head: the index of every key, and k and v of the attended ones, which each
/// query head of a group chooses for itself. Dense attention reads k and v once for the whole group.
fn bytes_per_key(cache: &SocketCache, mode: Mode, attended: f64, visible: f64) -> f64 {
    let shape = cache.shape();
    let kv = ((shape.head_dim + shape.value_dim) * shape.dtype.size()) as f64;
    if mode == Mode::Dense {
        return kv;
    }
    let memory = cache.memory();
    let key = (shape.head_dim * shape.dtype.size()) as f64;
    let index = (memory.bits + memory.scalars) as f64 / memory.keys as f64 * key;
    index + attended / visible * shape.group() as f64 * kv
}

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// Decodes every step and compares it with the truth. Timed: append one token, attend, read the output back.
fn decode(
    contender: &Contender,
    cache: &mut SocketCache,
    stream: &Stream,
    tokens: usize,
    steps: &[Step],
) -> softhash::Result<Outcome> {
    let dim = SHAPE.head_dim;
    let options = DecodeOptions { mode: contender.mode, output: Some(DType::F32), ..Default::default() };
    let (mut times, mut near, mut attended) = (Vec::new(), Vec::new(), 0);
    for (i, step) in steps.iter().enumerate() {
        let visible = tokens + i + 1;
        let (k, v) = tokens_of(stream, visible - 1..visible);
        let q = TensorView::bf16(&step.q, [1, 1, SHAPE.q_heads, dim]);
        let start = Instant::now();
        cache.append(&k, &v)?;
        let o = cache.decode_with(&q, &options)?.o.read_blocking()?.to_f32();
        times.push(start.elapsed());

        let everything: Vec<usize> = (0..visible).collect();
        let selected = match contender.mode {
            Mode::Dense => vec![everything; SHAPE.q_heads],
            _ => selected(cache, &q, &options)?,
        };
        for (h, truth) in step.heads.iter().enumerate() {
            let o: Vec<f64> = o[h * dim..(h + 1) * dim].iter().map(|x| f64::from(*x)).collect();
            near.push(truth.compare(&o, &selected[h], &step.heavy[h]));
            attended += selected[h].len();
        }
    }
    let visible = tokens as f64 + (steps.len() + 1) as f64 / 2.0;
    let bytes_per_key = bytes_per_key(cache, contender.mode, attended as f64 / near.len() as f64, visible);
    let cost = Some(Cost { bytes_per_key, step: median(times) });
    Ok(Outcome { name: contender.name, cost, nearness: Nearness::mean(&near) })
}

/// What a selector that knew the true weights would reach: the heaviest keys beside sink and window.
fn perfect(stream: &Stream, tokens: usize, steps: &[Step]) -> Outcome {
    let config = SocketConfig::paper();
    let mut near = Vec::new();
    for (i, step) in steps.iter().enumerate() {
        let visible = tokens + i + 1;
        for (truth, heavy) in step.heads.iter().zip(&step.heavy) {
            let mut keys: Vec<usize> = (0..config.sink).chain(visible - config.window..visible).collect();
            keys.extend(heavy);
            keys.sort_unstable();
            let o = truth.output_over(stream, keys.iter().copied());
            near.push(truth.compare(&o, &keys, heavy));
        }
    }
    Outcome { name: "(a perfect selector)", cost: None, nearness: Nearness::mean(&near) }
}

/// The keys that each query head attends to, ascending.
fn selected(cache: &mut SocketCache, q: &TensorView<'_>, options: &DecodeOptions) -> softhash::Result<Vec<Vec<usize>>> {
    let result = cache.decode_with(q, &DecodeOptions { selection: true, ..*options })?;
    let Some(selection) = result.selection else {
        return Ok(vec![Vec::new(); SHAPE.q_heads]);
    };
    let indices = selection.indices.read_blocking()?;
    let width = indices.shape().last().copied().unwrap_or(1).max(1);
    let keys = |row: &[i32]| row.iter().filter_map(|&i| usize::try_from(i).ok()).collect();
    Ok(indices.to_i32().chunks(width).map(keys).collect())
}

fn report(outcomes: &[Outcome]) {
    let Some(dense) = outcomes.first().and_then(|o| o.cost) else { return };
    let rows: Vec<Vec<String>> = outcomes
        .iter()
        .map(|o| {
            let mut cells = vec![o.name.to_string()];
            cells.extend(match o.cost {
                None => ["", "", "", ""].map(String::from),
                Some(cost) => [
                    format!("{:.1}", cost.bytes_per_key),
                    format!("{:.2}x", dense.bytes_per_key / cost.bytes_per_key),
                    format!("{:.3}", cost.step.as_secs_f64() * 1e3),
                    format!("{:.2}x", dense.step.as_secs_f64() / cost.step.as_secs_f64()),
                ],
            });
            let Nearness { recall, mass, error } = o.nearness;
            cells.extend([format!("{recall:.3}"), format!("{mass:.3}"), format!("{error:.1e}")]);
            cells
        })
        .collect();
    let headers = ["", "bytes/key", "less", "ms/step", "faster", "recall", "mass", "error"];
    table::print(&headers, &rows);
}

fn run(args: &Args) -> Result<(), Box<dyn Error>> {
    let (tokens, count) = (args.tokens as usize, args.steps as usize);
    let device = device::choose(&args.device)?;
    println!("{}", device.report());
    println!(
        "{tokens} tokens, {} query heads, {} kv heads, {} channels, bf16",
        SHAPE.q_heads, SHAPE.kv_heads, SHAPE.head_dim
    );

    let contenders = contenders();
    let bar = progress::bar((tokens * (contenders.len() + 1)) as u64);
    bar.set_message("drawing keys and values");
    let mut stream = Stream::new(SHAPE, tokens + count, args.seed, |n| bar.inc(n));
    let steps = steps(&mut stream, tokens, count);
    let mut outcomes = Vec::new();
    for contender in &contenders {
        bar.set_message(format!("building: {}", contender.name));
        let mut cache = build(&device, &contender.config, &stream, tokens, |n| bar.inc(n))?;
        // The first step pays for what is made once: kernels, scratch space, first touches.
        let q = TensorView::bf16(&steps[0].q, [1, 1, SHAPE.q_heads, SHAPE.head_dim]);
        cache.decode_with(&q, &DecodeOptions { mode: contender.mode, ..Default::default() })?.o.read_blocking()?;
        outcomes.push(decode(contender, &mut cache, &stream, tokens, &steps)?);
    }
    outcomes.push(perfect(&stream, tokens, &steps));
    bar.finish_and_clear();

    report(&outcomes);
    println!();
    println!("bytes/key  read per key and kv head in one step: index of all keys, k and v of the attended ones");
    println!("ms/step    median of {count} steps: append one token, attend, read the output back");
    println!("recall     share of the true heaviest {} keys found", steps[0].heavy[0].len());
    println!("mass       true attention weight of the attended keys");
    println!("error      of the output, relative to exact attention in f64; means over heads and steps");
    let kernels = device.report().kernels;
    if !kernels.is_empty() {
        let labels: Vec<&str> = kernels.iter().map(|k| k.label.as_str()).collect();
        println!("kernels    {}", labels.join(", "));
    }
    Ok(())
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
