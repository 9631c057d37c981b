//! Trains a small model on multi-query associative recall, with RACE attention through this library's own backward and
//! with softmax attention as the control, all else equal.
//!
//! `cargo run --release --example train_copy -- [--device auto|cpu|NAME] [--steps N] [--seeds N] [--window W]
//! [--plot FILE.svg]`

mod attention;
#[path = "../common/device.rs"]
mod device;
mod layers;
mod matrix;
mod model;
mod plot;
#[path = "../common/progress.rs"]
mod progress;
#[path = "../common/table.rs"]
mod table;
mod task;

use attention::{Attention, Hash, RaceAttention, Sizes, Softmax};
use clap::Parser;
use model::{Adam, Model};
use rayon::prelude::*;
use softhash::{Device, Normalization};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;
use task::{Batch, Source, Task};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Sequences that accuracy is measured on.
const UNSEEN: usize = 128;
/// Points of a curve.
const POINTS: usize = 10;
/// What the control must reach for the setting to say anything.
const ENOUGH: f64 = 0.9;

#[derive(Clone, Debug, Parser)]
#[command(about = "RACE and softmax attention learn associative recall")]
struct Args {
    /// What runs RACE: auto, cpu, or part of an adapter's name.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Steps of training.
    #[arg(long, default_value_t = 600, value_parser = clap::value_parser!(u32).range(2..))]
    steps: u32,
    /// Runs of every arm.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    seeds: u32,
    /// Sequences of a step.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    batch: u32,
    /// Tokens of a sequence.
    #[arg(long, default_value_t = 64)]
    tokens: usize,
    /// Pairs of key and value in a sequence.
    #[arg(long, default_value_t = 8)]
    pairs: usize,
    /// Kinds of tokens.
    #[arg(long, default_value_t = 64)]
    vocabulary: usize,
    /// Channels.
    #[arg(long, default_value_t = 64)]
    width: usize,
    #[arg(long, default_value_t = 2)]
    heads: usize,
    /// Tokens that the short convolution before attention spans.
    #[arg(long, default_value_t = 2)]
    conv: usize,
    /// Largest learning rate.
    #[arg(long, default_value_t = 3e-3)]
    rate: f32,
    /// Hyperplanes per table, P.
    #[arg(long, default_value_t = 4)]
    planes: usize,
    /// Hash tables, L.
    #[arg(long, default_value_t = 4)]
    tables: usize,
    /// Of RACE: ratio, mean or sum.
    #[arg(long, default_value = "ratio", value_parser = normalization)]
    normalization: Normalization,
    /// Arms of RACE: `trained` or `trained:x` (from 1, or x), `fixed` or `fixed:x` (at 1/√D, or x).
    #[arg(long, value_delimiter = ',', default_value = "trained,fixed")]
    beta: Vec<String>,
    /// Tokens of the exact window beside RACE, its gates trained; 0 for none.
    #[arg(long, default_value_t = 0)]
    window: usize,
    /// Where the curves are drawn.
    #[arg(long)]
    plot: Option<PathBuf>,
}

fn normalization(name: &str) -> std::result::Result<Normalization, String> {
    match name {
        "ratio" => Ok(Normalization::Ratio),
        "mean" => Ok(Normalization::BucketMean),
        "sum" => Ok(Normalization::BucketSum),
        _ => Err("must be ratio, mean or sum".into()),
    }
}

/// What a model attends with.
#[derive(Clone, Copy, Debug)]
enum Arm {
    Softmax,
    Race(Hash),
}

impl Args {
    fn sizes(&self) -> Sizes {
        Sizes { tokens: self.tokens, heads: self.heads, head_dim: self.width / self.heads }
    }

    fn task(&self) -> Task {
        Task { vocabulary: self.vocabulary, tokens: self.tokens, pairs: self.pairs }
    }

    fn arms(&self) -> Result<Vec<(String, Arm)>> {
        let mut arms = vec![("softmax".to_string(), Arm::Softmax)];
        for choice in &self.beta {
            let (kind, value) = choice.split_once(':').map_or((choice.as_str(), None), |(kind, x)| (kind, Some(x)));
            let value = value.map(str::parse::<f32>).transpose()?.filter(|x| x.is_finite() && *x > 0.0);
            let (trained, beta) = match kind {
                "trained" => (true, value.unwrap_or(1.0)),
                "fixed" => (false, value.unwrap_or(1.0 / (self.sizes().head_dim as f32).sqrt())),
                _ => return Err(format!("--beta takes trained, trained:x, fixed or fixed:x, not {choice}").into()),
            };
            let how = if trained { "trained from" } else { "fixed at" };
            let Self { planes, tables, normalization, window, .. } = *self;
            let beside = if window > 0 { format!(", window {window}") } else { String::new() };
            let name = format!("RACE P{planes} L{tables}, β {how} {beta:.3}{beside}");
            arms.push((name, Arm::Race(Hash { planes, tables, normalization, beta, trained, window })));
        }
        Ok(arms)
    }

    fn check(&self) -> Result<()> {
        self.task().check()?;
        if self.heads == 0 || self.width == 0 || !self.width.is_multiple_of(self.heads) || self.conv == 0 {
            return Err("--width must be a multiple of --heads, and --conv at least 1".into());
        }
        Ok(())
    }
}

/// A point of a curve.
#[derive(Clone, Copy, Debug)]
struct Point {
    step: u32,
    accuracy: f64,
}

/// What one run showed.
#[derive(Clone, Debug, Default)]
struct Curve {
    points: Vec<Point>,
    /// Of every step, on the sequences it trained on.
    losses: Vec<f64>,
    seconds: f64,
}

impl Curve {
    fn fell(&self) -> bool {
        let tail = &self.losses[self.losses.len() * 4 / 5..];
        let last = tail.iter().sum::<f64>() / tail.len() as f64;
        last < 0.95 * self.losses[0]
    }

    fn last(&self) -> f64 {
        self.points.last().map_or(0.0, |p| p.accuracy)
    }
}

/// The mean curve over runs of an arm.
fn mean(curves: &[Curve]) -> Vec<Point> {
    let at = |i: usize| {
        let points = curves.iter().map(|c| c.points[i]);
        Point {
            step: curves[0].points[i].step,
            accuracy: points.map(|p| p.accuracy).sum::<f64>() / curves.len() as f64,
        }
    };
    (0..curves[0].points.len()).map(at).collect()
}

fn train(args: &Args, device: &Device, arm: Arm, seed: u64, unseen: &Batch, progress: impl Fn()) -> Result<Curve> {
    let (sizes, start) = (args.sizes(), Instant::now());
    let mut model = Model::new(sizes, args.vocabulary, args.conv, seed, |seed| match arm {
        Arm::Softmax => Ok(Box::new(Softmax::new(sizes)) as Box<dyn Attention + Send>),
        Arm::Race(hash) => Ok(Box::new(RaceAttention::new(device, sizes, hash, seed)?)),
    })?;
    let mut source = Source::new(args.task(), seed + 1);
    let mut adam = Adam::new(args.rate, args.steps as usize);
    let mut curve = Curve::default();
    let every = args.steps.div_ceil(POINTS as u32);
    for step in 0..=args.steps {
        if step % every == 0 || step == args.steps {
            curve.points.push(Point { step, accuracy: model.score(unseen)?.accuracy });
        }
        if step < args.steps {
            curve.losses.push(model.gradients(&source.batch(args.batch as usize))?.loss);
            adam.step(model.parameters());
            progress();
        }
    }
    curve.seconds = start.elapsed().as_secs_f64();
    Ok(curve)
}

fn report(arms: &[(String, Vec<Curve>)]) {
    let mut headers = vec!["accuracy at step".to_string()];
    headers.extend(arms[0].1[0].points.iter().map(|p| p.step.to_string()));
    headers.extend(["least", "most", "loss", "s/run"].map(String::from));
    let rows: Vec<Vec<String>> = arms
        .iter()
        .map(|(name, curves)| {
            let mut row = vec![name.clone()];
            row.extend(mean(curves).iter().map(|p| format!("{:.3}", p.accuracy)));
            let last = || curves.iter().map(Curve::last);
            row.push(format!("{:.3}", last().fold(1.0, f64::min)));
            row.push(format!("{:.3}", last().fold(0.0, f64::max)));
            let mean = |of: &dyn Fn(&Curve) -> f64| curves.iter().map(of).sum::<f64>() / curves.len() as f64;
            row.push(format!("{:.3}", mean(&|c| *c.losses.last().unwrap_or(&f64::NAN))));
            row.push(format!("{:.1}", mean(&|c| c.seconds)));
            row
        })
        .collect();
    table::print(&headers.iter().map(String::as_str).collect::<Vec<_>>(), &rows);
}

fn run(args: &Args) -> Result<bool> {
    args.check()?;
    let device = device::choose(&args.device)?;
    println!("{}", device.report());
    println!(
        "recall of {} pairs among {} tokens of {} kinds; 2 layers of {} channels, {} heads; {} steps of {} sequences",
        args.pairs, args.tokens, args.vocabulary, args.width, args.heads, args.steps, args.batch
    );
    let arms = args.arms()?;
    let unseen = Source::new(args.task(), 0).batch(UNSEEN);
    let bar = progress::bar(u64::from(args.steps * args.seeds) * arms.len() as u64);
    bar.set_message("training");
    let runs: Vec<(Arm, u32)> = arms.iter().flat_map(|(_, arm)| (0..args.seeds).map(|seed| (*arm, seed))).collect();
    let one = |&(arm, seed): &(Arm, u32)| train(args, &device, arm, u64::from(seed), &unseen, || bar.inc(1));
    // A GPU takes one run after the other.
    let curves: Vec<Curve> = if device.is_cpu() {
        runs.par_iter().map(one).collect::<Result<_>>()?
    } else {
        runs.iter().map(one).collect::<Result<_>>()?
    };
    bar.finish_and_clear();
    let names = arms.into_iter().map(|(name, _)| name);
    let arms: Vec<(String, Vec<Curve>)> =
        names.zip(curves.chunks(args.seeds as usize).map(<[Curve]>::to_vec)).collect();
    report(&arms);
    if mean(&arms[0].1).last().is_none_or(|p| p.accuracy < ENOUGH) {
        println!("softmax stays below {ENOUGH}: this setting is too short or too hard to compare by");
    }
    if let Some(path) = &args.plot {
        let title = format!("{} pairs among {} tokens, {} seeds", args.pairs, args.tokens, args.seeds);
        plot::draw(path, &title, &arms)?;
        println!("drawn: {}", path.display());
    }
    Ok(arms.iter().flat_map(|(_, curves)| curves).all(Curve::fell))
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("error: the loss did not fall");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
