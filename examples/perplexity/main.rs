//! Bits per byte of a Llama-architecture model at long context, with dense attention and with any selector, all
//! attention through the library.
//!
//! `cargo run --release --example perplexity -- --model DIR --text FILE [--context N] [--tokens N] [--windows N]
//! [--budget SHARE] [--scoring NAME,...] [--device auto|cpu|NAME]`

mod config;
#[path = "../common/device.rs"]
mod device;
mod evaluate;
mod linear;
mod model;
#[path = "../common/progress.rs"]
mod progress;
mod selector;
#[path = "../common/table.rs"]
mod table;
mod text;
mod tiny;
mod weights;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use evaluate::{Plan, Score};
use model::Model;
use selector::{Budgets, Selector};
use softhash::DType;
use text::Tokens;

/// What everything here returns.
pub type Result<T, E = Box<dyn std::error::Error + Send + Sync>> = std::result::Result<T, E>;

/// An error of one message.
pub fn fail<T>(message: impl Into<String>) -> Result<T> {
    Err(message.into().into())
}

#[derive(Clone, Copy, ValueEnum)]
enum CacheType {
    F32,
    F16,
    Bf16,
}

#[derive(Parser)]
#[command(about = "Bits per byte of a language model under dense and sparse attention")]
struct Args {
    /// Model directory: config.json and safetensors of a Llama architecture.
    #[arg(long, required_unless_present = "make_tiny")]
    model: Option<PathBuf>,
    /// Text to score, for models whose vocabulary is the 256 bytes.
    #[arg(long, conflicts_with = "ids", required_unless_present_any = ["ids", "make_tiny"])]
    text: Option<PathBuf>,
    /// Token ids to score, little-endian u32, for any other vocabulary.
    #[arg(long, requires = "bytes")]
    ids: Option<PathBuf>,
    /// Bytes of text that all of --ids stand for.
    #[arg(long, value_parser = clap::value_parser!(u64).range(1..))]
    bytes: Option<u64>,
    /// Tokens in the cache at the end of a window.
    #[arg(long, default_value_t = 32768, value_parser = clap::value_parser!(u32).range(2..=1 << 24))]
    context: u32,
    /// Last positions of each window, decoded and scored.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..))]
    tokens: u32,
    /// Windows of text, spread evenly.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=65536))]
    windows: u32,
    /// Share of the keys attended, sink and window included.
    #[arg(long, default_value_t = 0.03)]
    budget: f32,
    /// First tokens, always attended.
    #[arg(long, default_value_t = 16)]
    sink: usize,
    /// Last tokens, always attended.
    #[arg(long, default_value_t = 64)]
    window: usize,
    /// Selectors to compare with dense attention.
    #[arg(long, value_delimiter = ',', default_value = "socket,socket-no-vnorm,sign128,hard", help = selector_help())]
    scoring: Vec<String>,
    /// What runs the attention: auto, cpu, or part of an adapter's name.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Element type of cached keys and values.
    #[arg(long, value_enum, default_value = "f32")]
    dtype: CacheType,
    /// Tokens per pass over the prompt.
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65536))]
    prefill_chunk: u32,
    /// Tokens per pass over the scored positions; the result does not depend on it.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=65536))]
    decode_chunk: u32,
    /// Write a small random model into this directory, and end.
    #[arg(long, value_name = "DIR")]
    make_tiny: Option<PathBuf>,
}

fn selector_help() -> String {
    format!("Selectors to compare with dense attention: {}", selector::NAMES)
}

fn tokens(args: &Args, model: &Model) -> Result<Tokens> {
    match (&args.text, &args.ids, args.bytes) {
        (_, Some(path), Some(bytes)) => text::ids(path, bytes),
        (Some(path), ..) if model.config.vocab_size == 256 => text::bytes(path),
        _ => fail(format!("a vocabulary of {} needs --ids and --bytes", model.config.vocab_size)),
    }
}

fn plan(args: &Args) -> Result<Plan> {
    let (context, scored) = (args.context as usize, args.tokens as usize);
    if scored > context {
        return fail(format!("--tokens {scored} passes --context {context}"));
    }
    let dtype = match args.dtype {
        CacheType::F32 => DType::F32,
        CacheType::F16 => DType::F16,
        CacheType::Bf16 => DType::Bf16,
    };
    let (prefill_chunk, decode_chunk) = (args.prefill_chunk as usize, args.decode_chunk as usize);
    Ok(Plan { context, scored, prefill_chunk, decode_chunk, dtype })
}

fn report(names: &[&str], scores: &[Score], bytes: f64, positions: usize) {
    let dense = scores.first().map_or(0.0, |s| s.bits) / bytes;
    let rows: Vec<Vec<String>> = names
        .iter()
        .zip(scores)
        .map(|(name, score)| {
            vec![
                name.to_string(),
                format!("{:.4}", score.bits / bytes),
                format!("{:+.4}", score.bits / bytes - dense),
                format!("{:.1}", score.decode.as_secs_f64()),
                format!("{:.2}", score.decode.as_secs_f64() * 1e3 / positions as f64),
            ]
        })
        .collect();
    table::print(&["", "bits/byte", "over dense", "seconds", "ms/token"], &rows);
}

fn run(args: &Args) -> Result<()> {
    if let Some(dir) = &args.make_tiny {
        return tiny::write(dir);
    }
    let plan = plan(args)?;
    let budgets = Budgets { ratio: args.budget, sink: args.sink, window: args.window };
    let dense = Selector::named("dense", budgets)?;
    let wanted = args.scoring.iter().filter(|name| *name != "dense");
    let others = wanted.map(|name| Selector::named(name, budgets)).collect::<Result<Vec<_>>>()?;
    let device = device::choose(&args.device)?;
    let Some(dir) = &args.model else { return fail("--model is missing") };
    let model = Model::load(dir)?;
    let config = &model.config;
    if plan.context > config.max_positions {
        eprintln!("note: --context {} passes the {} positions of training", plan.context, config.max_positions);
    }
    let tokens = tokens(args, &model)?;
    let windows = tokens.windows(args.windows as usize, plan.context + 1)?;

    let share = (plan.context as f64 * f64::from(args.budget)).ceil() as usize;
    let attended = share.max(args.sink + args.window).min(plan.context);
    println!("{}", device.report());
    println!(
        "model: {:.1} M weights, {} layers, {} query heads, {} kv heads, {} channels",
        model.parameters() as f64 * 1e-6,
        config.layers,
        config.q_heads,
        config.kv_heads,
        config.head_dim
    );
    println!(
        "last {} positions of {} window(s) at {} tokens, {:?} cache; budget {}: {} keys of the last position, {} first \
         and {} last ones among them",
        plan.scored,
        windows.len(),
        plan.context,
        plan.dtype,
        args.budget,
        attended,
        args.sink,
        args.window,
    );
    let bar = progress::bar(plan.work(config.layers, others.len() + 1) * windows.len() as u64);
    let mut totals = vec![Score::default(); others.len() + 1];
    for ids in &windows {
        let scores = evaluate::window(&device, &model, &plan, (&dense, &others), ids, &bar)?;
        for (total, score) in totals.iter_mut().zip(scores) {
            total.bits += score.bits;
            total.prefill += score.prefill;
            total.decode += score.decode;
        }
    }
    bar.finish_and_clear();

    let positions = plan.scored * windows.len();
    let names: Vec<&str> = std::iter::once(&dense).chain(&others).map(|s| s.name.as_str()).collect();
    report(&names, &totals, positions as f64 * tokens.bytes_per_token, positions);
    println!(
        "prompt: {:.1} s for {} tokens",
        totals[0].prefill.as_secs_f64(),
        (plan.context - plan.scored) * windows.len()
    );
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
