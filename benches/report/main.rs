//! Everything in one table: dense, SOCKET and RACE on every device of the machine, beside what else there is.
//!
//! ```text
//! cargo bench --features cuda --bench report -- [--device cuda --device nvidia] [--vendor] [--time-limit 200] [--out DIR]
//! ```
//! The executable runs without cargo and without this repository; `--help` says all. It writes `report.md`, `report.json`
//! and a plot per problem. No speed is reported of a result that was wrong; the exit code is 1 then.

#![allow(missing_docs, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod append;
mod arguments;
mod decode;
mod figure;
mod markdown;
mod peers;
mod plot;
mod race;
mod session;
#[path = "../support/mod.rs"]
pub mod support;
mod verdict;

pub use arguments::Arguments;
use arguments::Sizes;
use clap::Parser;
use figure::{Report, Subject, Table};
use indicatif::{ProgressBar, ProgressStyle};
use peers::Peers;
use session::Session;
use softhash::Device;
use std::process::ExitCode;
use std::time::{Duration, Instant};
use support::data::Problem;
use support::origin::{Origin, commit, now};
use support::outcome::Outcome;
use support::race_layer::Truths;

#[allow(dead_code, reason = "a test calls what it calls")]
fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => {
            eprintln!("error: a result was wrong; its time was not taken");
            ExitCode::FAILURE
        }
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::from(2)
        }
    }
}

/// Measures, prints and saves; whether every result was right.
pub fn run(arguments: &Arguments) -> Outcome<bool> {
    let start = Instant::now();
    let sizes = Sizes::new(arguments);
    std::fs::create_dir_all(&arguments.out).map_err(|error| format!("{}: {error}", arguments.out.display()))?;
    let deadline = arguments.time_limit.map(|seconds| start + Duration::from_secs_f64(seconds));
    let mut report = Report {
        version: env!("CARGO_PKG_VERSION"),
        commit: arguments.commit.clone().unwrap_or_else(commit),
        date: figure::date(now()),
        command: std::env::args().skip(1).fold("report".into(), |all, one| all + " " + &one),
        seconds: 0.0,
        devices: Vec::new(),
        missing: Vec::new(),
        peers: None,
        figures: Vec::new(),
        verdicts: Vec::new(),
    };
    measure_peers(arguments, &sizes, &mut report);
    measure_devices(arguments, &sizes, deadline, &mut report, |report| save(arguments, start, report))?;
    println!("{}", markdown::render(&report));
    Ok(report.is_right())
}

/// Writes what there is so far.
fn save(arguments: &Arguments, start: Instant, report: &mut Report) -> Outcome<()> {
    report.verdicts = verdict::verdicts(report);
    report.seconds = start.elapsed().as_secs_f64();
    let write = |name: &str, text: &str| std::fs::write(arguments.out.join(name), text);
    write("report.md", &markdown::render(report))?;
    write("report.json", &serde_json::to_string_pretty(report)?)?;
    plot::draw(report, &arguments.out)
}

/// Before any device is open, since they are measured on one of them.
fn measure_peers(arguments: &Arguments, sizes: &Sizes, report: &mut Report) {
    let list = |all: Vec<String>| all.join(",");
    let script: Vec<String> = vec![
        "--lengths".into(),
        list(sizes.lengths.iter().map(ToString::to_string).collect()),
        "--heads".into(),
        list(sizes.heads.iter().map(|(q, kv)| format!("{q}/{kv}")).collect()),
        "--head-dims".into(),
        list(sizes.head_dims.iter().map(ToString::to_string).collect()),
        "--linear".into(),
        list(sizes.tokens.iter().map(ToString::to_string).collect()),
    ];
    // A quarter for them.
    let seconds = arguments.time_limit.map_or(120.0, |limit| limit / 4.0);
    let mut peers = Peers { head_dim: sizes.head_dim, ..Peers::default() };
    arguments.vendor.iter().for_each(|source| peers.add(source, &script, seconds));
    report.missing.extend(peers.missing);
    report.figures.extend(peers.figures);
    report.peers = peers.origin.filter(|_| !report.figures.is_empty());
}

/// All that this machine has.
fn all_devices() -> Vec<String> {
    let gpus = Device::enumerate().into_iter().filter(|d| !d.software && d.backend != "Cuda");
    let cuda = cfg!(feature = "cuda").then(|| "cuda".to_string());
    cuda.into_iter().chain(gpus.take(1).map(|d| d.name)).chain(["cpu".into()]).collect()
}

/// One device after the other; `save` is called after each.
fn measure_devices(
    arguments: &Arguments,
    sizes: &Sizes,
    deadline: Option<Instant>,
    report: &mut Report,
    save: impl Fn(&mut Report) -> Outcome<()>,
) -> Outcome<()> {
    let asked = if arguments.device.is_empty() { all_devices() } else { arguments.device.clone() };
    let mut problems: Vec<Problem> =
        sizes.heads.iter().map(|&(q, kv)| Problem::new(q, kv, sizes.head_dim, sizes.lengths[0])).collect();
    let mut truths = Truths::default();
    let style = ProgressStyle::with_template("{elapsed} {pos} figures, {wide_msg}");
    let bar = ProgressBar::no_length().with_style(style.unwrap_or_else(|_| ProgressStyle::default_spinner()));
    for (i, name) in asked.iter().enumerate() {
        let device = match Device::by_name(name) {
            Ok(device) => device,
            Err(error) => {
                let error = error.to_string();
                report.missing.push(format!("{name}: {}", error.lines().next().unwrap_or_default()));
                continue;
            }
        };
        let subject = Subject { asked: name.clone(), origin: Origin::new(&device) };
        // What is left is shared by the devices that are left.
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        let until = deadline.map(|deadline| Instant::now() + left(deadline) / (asked.len() - i) as u32);
        let session = Session::new(device, &subject, sizes.seconds, until, &mut report.figures, &bar);
        report.devices.push(subject);
        match session {
            Ok(mut session) if session.is_software() => {
                tables(&mut session, arguments, &sizes.for_software(arguments), &mut problems, &mut truths);
            }
            Ok(mut session) => tables(&mut session, arguments, sizes, &mut problems, &mut truths),
            Err(error) => report.missing.push(format!("{name}: {error}")),
        }
        save(report)?;
    }
    bar.finish_and_clear();
    save(report)
}

/// All tables of one device. Those by length take a share of the time that the ones before have left, the others what they
/// need.
fn tables(session: &mut Session, arguments: &Arguments, sizes: &Sizes, problems: &mut [Problem], truths: &mut Truths) {
    let wanted = |table| arguments.only.is_empty() || arguments.only.contains(&table);
    let (q, kv) = sizes.heads[0];
    if wanted(Table::RaceStep) {
        race::steps(session, sizes);
    }
    if wanted(Table::Decode) {
        for (i, problem) in problems.iter_mut().enumerate() {
            decode::by_length(session, [0.3, 0.45][i.min(1)], sizes, problem);
        }
    }
    if wanted(Table::HeadDims) {
        for &dim in &sizes.head_dims {
            decode::whole(session, Table::HeadDims, &mut Problem::new(q, kv, dim, sizes.head_dims_keys));
        }
    }
    if wanted(Table::Ragged) {
        decode::whole(session, Table::Ragged, &mut Problem::ragged(q, kv, sizes.head_dim, sizes.ragged.clone()));
    }
    if wanted(Table::Append) {
        append::all(session, sizes);
    }
    if wanted(Table::Race) {
        race::by_length(session, sizes, truths);
    }
}
