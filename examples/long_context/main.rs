//! One layer of RACE attention over a context of any length, forward and backward, in memory or as a stream; with
//! progress, speed, memory, and a check of some tokens against sums in f64.
//!
//! `cargo run --release --example long_context -- [--device auto|cpu|NAME] [--tokens 75000000] [--direction both]`
//!
//! The tensors come from a counter-based generator, in a shader where the device is a GPU: nothing is read from disk,
//! and a stream's data never crosses the bus.

#[path = "../common/counter.rs"]
mod counter;
#[cfg(feature = "cuda")]
#[path = "../common/counter_cuda.rs"]
mod counter_cuda;
#[cfg(feature = "wgpu")]
#[path = "../common/counter_gpu.rs"]
mod counter_gpu;
#[cfg(feature = "cuda")]
mod cuda;
#[path = "../common/device.rs"]
mod device;
mod memory;
#[path = "../common/progress.rs"]
mod progress;
#[path = "../common/race_truth.rs"]
mod race_truth;
mod source;
#[path = "../common/table.rs"]
mod table;
#[cfg(test)]
mod tests;
#[cfg(feature = "cuda")]
mod truth_cuda;

use clap::{Parser, ValueEnum};
use counter::Counter;
use indicatif::ProgressBar;
use memory::Peak;
use race_truth::{At, Truth};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use softhash::{
    Beta, Boundaries, DType, Device, Race, RaceConfig, RaceShape, ResidentSource, SegmentGradients, SegmentSource,
    StreamFailure, StreamOptions, StreamProgress, Tensor, Wanted,
};
use source::Source;
use std::ops::{ControlFlow, Range};
use std::process::ExitCode;
use std::time::Instant;

type Result<T> = std::result::Result<T, StreamFailure>;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// All tensors and results held, as lists of segments; o in the inputs' type.
    Memory,
    /// A segment at a time.
    Stream,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Direction {
    Forward,
    Both,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Type {
    F32,
    Bf16,
}

#[derive(Debug, Parser)]
#[command(about = "RACE attention over a long context")]
struct Args {
    /// What runs it: auto, cpu, or part of an adapter's name.
    #[arg(long, default_value = "auto")]
    device: String,
    #[arg(long, default_value_t = 1 << 20, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    #[arg(long, value_enum, default_value = "stream")]
    mode: Mode,
    #[arg(long, value_enum, default_value = "both")]
    direction: Direction,
    /// Tokens of a segment; of a stream 4096 on the CPU, 65536 on a GPU and 262144 with CUDA by default, in memory
    /// 1048576.
    #[arg(long)]
    segment: Option<usize>,
    #[arg(long, value_enum, default_value = "f32")]
    dtype: Type,
    #[arg(long, default_value_t = 4)]
    heads: usize,
    #[arg(long, default_value_t = 128)]
    head_dim: usize,
    /// Hyperplanes per table, P.
    #[arg(long, default_value_t = 2)]
    planes: usize,
    /// Hash tables, L.
    #[arg(long, default_value_t = 2)]
    tables: usize,
    /// Tokens compared with sums in f64 over all of the context, of one head; 0 leaves that out. With CUDA the device
    /// makes the sums, elsewhere the host: on 2 cores that takes about as long as the CPU path itself.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(..=1000))]
    check: u32,
    /// Seed of the tensors and of what is checked.
    #[arg(long, default_value_t = 0)]
    seed: u32,
}

impl Args {
    fn dtype(&self) -> DType {
        match self.dtype {
            Type::F32 => DType::F32,
            Type::Bf16 => DType::Bf16,
        }
    }
}

const BETA: f32 = 1.0;
/// States that a stream keeps on its way for the backward; with CUDA one for each segment of a billion tokens.
const BOUNDARIES: usize = 4096;

/// Checked tokens, and what the library gave for them.
struct Checked {
    #[cfg(feature = "cuda")]
    device: Device,
    head: usize,
    tokens: Vec<u64>,
    found: Vec<At>,
}

impl Checked {
    #[cfg_attr(not(feature = "cuda"), allow(unused_variables, reason = "only CUDA's rows are read one by one"))]
    fn new(args: &Args, device: &Device) -> Self {
        let mut rng = ChaCha8Rng::seed_from_u64(u64::from(args.seed));
        let mut draw = |below: u64| rng.next_u64() % below;
        let mut tokens: Vec<u64> = (1..args.check).map(|_| draw(u64::from(args.tokens))).collect();
        // The last one has the whole context before it.
        tokens.extend((args.check > 0).then_some(u64::from(args.tokens) - 1));
        tokens.sort_unstable();
        tokens.dedup();
        let found = tokens.iter().map(|&token| At { token, ..At::default() }).collect();
        Self {
            #[cfg(feature = "cuda")]
            device: device.clone(),
            head: draw(args.heads as u64) as usize,
            tokens,
            found,
        }
    }

    /// Notes the checked tokens of a result over `range`.
    fn note(&mut self, range: &Range<u64>, tensor: &Tensor, of: impl Fn(&mut At) -> &mut Vec<f64>) -> Result<()> {
        #[cfg(feature = "cuda")]
        if cuda::note(&self.device, &mut self.found, self.head, range, tensor, &of)? {
            return Ok(());
        }
        Ok(race_truth::note(&mut self.found, self.head, range, tensor, of)?)
    }

    /// Notes the checked tokens of those gradients that there are.
    fn note_gradients(&mut self, range: &Range<u64>, got: &SegmentGradients) -> Result<()> {
        let mut note = |tensor: &Option<Tensor>, of: fn(&mut At) -> &mut Vec<f64>| match tensor {
            Some(tensor) => self.note(range, tensor, of),
            None => Ok(()),
        };
        note(&got.dq, |at| &mut at.dq)?;
        note(&got.dk, |at| &mut at.dk)?;
        note(&got.dv, |at| &mut at.dv)
    }
}

/// Seconds of both directions.
#[derive(Default)]
struct Times {
    forward: f64,
    backward: Option<f64>,
}

/// Everything held at once: inputs as a list of segments, for no buffer holds millions of tokens, and results likewise.
fn in_memory(args: &Args, race: &mut Race, source: &Source, checked: &mut Checked, peak: &mut Peak) -> Result<Times> {
    let tokens = u64::from(args.tokens);
    let backward = args.direction == Direction::Both;
    let step = args.segment.unwrap_or(1 << 20).clamp(1, args.tokens as usize);
    let bar = progress::bar(tokens * if backward { 3 } else { 2 });
    bar.set_message("making tensors");
    let mut segments = Vec::new();
    for first in (0..tokens).step_by(step) {
        let range = first..(first + step as u64).min(tokens);
        let wanted = Wanted { q: true, k: true, v: true, grad_o: backward };
        // A maker of its own for each: one reuses its buffers.
        segments.push(source.another(race.device())?.read(range.clone(), wanted)?);
        bar.inc(range.end - range.start);
    }
    let mut resident = ResidentSource::new(segments)?;
    let mut times = Times::default();
    let mut boundaries = Boundaries::new(BOUNDARIES);
    let mut state = race.new_state(1)?;
    let mut outputs = Vec::new();
    bar.set_message("forward");
    let start = Instant::now();
    {
        let mut options =
            StreamOptions { segment_tokens: step, boundaries: Some(&mut boundaries), ..Default::default() };
        let mut sink = |range: Range<u64>, o: Tensor| {
            bar.inc(range.end - range.start);
            outputs.push((range, o));
            Ok(())
        };
        race.forward_stream(&mut state, &mut resident, &mut sink, &mut options)?;
    }
    times.forward = start.elapsed().as_secs_f64();
    peak.sample();
    for (range, o) in outputs.drain(..) {
        checked.note(&range, &o, |at| &mut at.o)?;
    }
    if backward {
        let mut gradients = Vec::new();
        bar.set_message("backward");
        let start = Instant::now();
        let mut stream = race.begin_backward_stream(1, tokens, None, None, Some(boundaries))?;
        let mut options = StreamOptions { segment_tokens: step, ..Default::default() };
        let mut sink = |range: Range<u64>, got: SegmentGradients| {
            bar.inc(range.end - range.start);
            gradients.push((range, got));
            Ok(())
        };
        race.backward_stream(&mut stream, &mut resident, &mut sink, &mut options)?;
        stream.finish()?;
        times.backward = Some(start.elapsed().as_secs_f64());
        peak.sample();
        for (range, got) in &gradients {
            checked.note_gradients(range, got)?;
        }
    }
    bar.finish_and_clear();
    Ok(times)
}

/// Runs a short stream and throws it away, so that no time has a compiler's in it.
fn warm_up(args: &Args, race: &mut Race, counter: Counter) -> Result<()> {
    race.warm_up(args.dtype())?;
    let tokens = u64::from(args.tokens).min(256);
    let mut source = Source::new(race.device(), counter, tokens)?;
    let mut boundaries = Boundaries::new(BOUNDARIES);
    let mut state = race.new_state(1)?;
    let mut options = StreamOptions { boundaries: Some(&mut boundaries), ..Default::default() };
    race.forward_stream(&mut state, &mut source, &mut |_, _| Ok(()), &mut options)?;
    if args.direction == Direction::Both {
        let mut stream = race.begin_backward_stream(1, tokens, None, None, Some(boundaries))?;
        race.backward_stream(&mut stream, &mut source, &mut |_, _| Ok(()), &mut StreamOptions::default())?;
    }
    Ok(())
}

/// Shows a stream's progress and samples memory.
fn watch<'a>(bar: &'a ProgressBar, peak: &'a mut Peak) -> impl FnMut(StreamProgress) -> ControlFlow<()> + 'a {
    |progress| {
        bar.set_message(progress.sweep);
        bar.set_position(progress.done);
        peak.sample();
        ControlFlow::Continue(())
    }
}

fn streamed(
    args: &Args,
    race: &mut Race,
    source: &mut Source,
    checked: &mut Checked,
    peak: &mut Peak,
) -> Result<Times> {
    let segment_tokens = args.segment.unwrap_or(match race.device().path_name() {
        "cuda" => 1 << 18,
        _ if race.device().is_cpu() => 1 << 12,
        _ => 1 << 16,
    });
    let bar = progress::bar(u64::from(args.tokens));
    let mut times = Times::default();
    let mut boundaries = Boundaries::new(BOUNDARIES);
    let mut state = race.new_state(1)?;
    let start = Instant::now();
    {
        let mut told = watch(&bar, peak);
        let mut options = StreamOptions {
            segment_tokens,
            progress: Some(&mut told),
            boundaries: (args.direction == Direction::Both).then_some(&mut boundaries),
            ..StreamOptions::default()
        };
        let mut sink = |range: Range<u64>, o: Tensor| checked.note(&range, &o, |at| &mut at.o);
        race.forward_stream(&mut state, source, &mut sink, &mut options)?;
    }
    times.forward = start.elapsed().as_secs_f64();
    if args.direction == Direction::Both {
        let start = Instant::now();
        let mut stream = race.begin_backward_stream(1, u64::from(args.tokens), None, None, Some(boundaries))?;
        let mut told = watch(&bar, peak);
        let mut options = StreamOptions { segment_tokens, progress: Some(&mut told), ..StreamOptions::default() };
        let mut sink = |range: Range<u64>, got: SegmentGradients| checked.note_gradients(&range, &got);
        race.backward_stream(&mut stream, source, &mut sink, &mut options)?;
        stream.finish()?;
        times.backward = Some(start.elapsed().as_secs_f64());
    }
    bar.finish_and_clear();
    Ok(times)
}

/// The truth at the checked tokens, from sums over all of them: the device's where it makes such, else the host's.
#[cfg_attr(not(feature = "cuda"), allow(unused_variables, reason = "only CUDA devices have doubles"))]
fn truths(args: &Args, device: &Device, truth: &Truth, wanted: &[u64], bar: &ProgressBar) -> Result<Vec<At>> {
    let (tokens, backward) = (u64::from(args.tokens), args.direction == Direction::Both);
    #[cfg(feature = "cuda")]
    if let Some(truths) = truth_cuda::at(device, truth, tokens, wanted, backward, |n| bar.inc(n))? {
        return Ok(truths);
    }
    Ok(truth.at(tokens, wanted, backward, |n| bar.inc(n)))
}

/// Largest error of each result, and whether all are within the tolerance.
fn compare(args: &Args, race: &Race, counter: Counter, checked: &Checked) -> Result<bool> {
    let truth = Truth {
        counter,
        head: checked.head,
        planes: race.hyperplanes()?.into_iter().map(f64::from).collect(),
        planes_per_table: args.planes,
        beta: f64::from(BETA),
    };
    let backward = args.direction == Direction::Both;
    let tokens = u64::from(args.tokens);
    let bar = progress::bar(tokens * if backward { 2 } else { 1 });
    bar.set_message("checking in f64");
    let start = Instant::now();
    let truths = truths(args, race.device(), &truth, &checked.tokens, &bar)?;
    bar.finish_and_clear();
    let names = if backward { &["o", "dq", "dk", "dv"][..] } else { &["o"] };
    let mut worst = 0f64;
    let mut rows = Vec::new();
    for (found, truth) in checked.found.iter().zip(&truths) {
        let mut row = vec![found.token.to_string()];
        for (found, truth) in found.parts().into_iter().zip(truth.parts()).take(names.len()) {
            let error = race_truth::error(found, truth);
            worst = worst.max(error);
            row.push(format!("{error:.1e}"));
        }
        rows.push(row);
    }
    let mut headers = vec!["error at token"];
    headers.extend(names);
    table::print(&headers, &rows);
    let seconds = start.elapsed().as_secs_f64();
    println!("head {} against sums in f64 over all tokens, in {seconds:.1} s", checked.head);
    Ok(worst <= race_truth::tolerance(args.dtype()))
}

fn run(args: &Args) -> Result<bool> {
    let device = device::choose(&args.device)?;
    println!("{}", device.report());
    let shape = RaceShape {
        num_q_heads: args.heads,
        num_kv_heads: args.heads,
        head_dim: args.head_dim,
        value_dim: args.head_dim,
        dtype: args.dtype(),
    };
    let config =
        RaceConfig { planes: args.planes, tables: args.tables, beta: Beta::Shared(BETA), ..RaceConfig::default() };
    let mut race = Race::new(&device, config, shape)?;
    println!(
        "{} tokens, {} heads of {} channels, {:?}, P = {}, L = {}, {:?}",
        args.tokens,
        args.heads,
        args.head_dim,
        args.dtype(),
        args.planes,
        args.tables,
        args.mode
    );
    let counter = Counter {
        seed: args.seed,
        heads: args.heads,
        channels: args.head_dim,
        dtype: args.dtype(),
        period: u64::from(u32::MAX),
    };
    let mut source = Source::new(&device, counter, u64::from(args.tokens))?;
    if !source.check()? {
        return Err("the device makes other tensors than the host".into());
    }
    warm_up(args, &mut race, counter)?;
    let mut checked = Checked::new(args, &device);
    let mut peak = Peak::new(&device);
    let times = match args.mode {
        Mode::Memory => in_memory(args, &mut race, &source, &mut checked, &mut peak)?,
        Mode::Stream => streamed(args, &mut race, &mut source, &mut checked, &mut peak)?,
    };
    let speed = |name: &str, seconds: f64| {
        println!("{name:9} {seconds:9.2} s {:12.0} tokens/s", f64::from(args.tokens) / seconds);
    };
    speed("forward", times.forward);
    if let Some(seconds) = times.backward {
        speed("backward", seconds);
    }
    if args.mode == Mode::Stream {
        println!("          the making of the tensors included");
    }
    peak.print(source.bytes());
    Ok(args.check == 0 || compare(args, &race, counter, &checked)?)
}

fn main() -> ExitCode {
    let args = Args::parse();
    match run(&args) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("error: a result is off by more than {:.0e}", race_truth::tolerance(args.dtype()));
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
