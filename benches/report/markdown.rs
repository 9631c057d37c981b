//! The tables for people.

use super::figure::{Case, Figure, Outcome, Report, Table, count, time};
use super::peers::DEVICE;
use std::fmt::Write;

pub fn render(report: &Report) -> String {
    let mut out = String::new();
    head(&mut out, report);
    decode(&mut out, report);
    for table in [Table::Ragged, Table::HeadDims] {
        others(&mut out, report, table);
    }
    append(&mut out, report);
    race(&mut out, report);
    steps(&mut out, report);
    notes(&mut out, report);
    out
}

/// A line of a table.
fn row(out: &mut String, cells: impl IntoIterator<Item = String>) {
    out.push('|');
    cells.into_iter().for_each(|cell| out.extend([" ", &cell, " |"]));
    out.push('\n');
}

/// A table of `cell`s, its rows and columns in the order in which they first appear.
fn pivot<'a>(
    out: &mut String,
    corner: &str,
    figures: &[&'a Figure],
    name: impl Fn(&Case) -> String,
    column: impl Fn(&Case) -> String,
    cell: impl Fn(&'a Figure) -> String,
) {
    if figures.is_empty() {
        return;
    }
    let unique = |of: &dyn Fn(&Case) -> String| {
        let mut all: Vec<String> = Vec::new();
        for figure in figures {
            let one = of(&figure.case);
            if !all.contains(&one) {
                all.push(one);
            }
        }
        all
    };
    let (names, columns) = (unique(&name), unique(&column));
    row(out, [corner.to_string()].into_iter().chain(columns.iter().cloned()));
    out.extend(["|---"].into_iter().cycle().take(columns.len() + 1));
    out.push_str("|\n");
    for one in names {
        let of = |wanted: &String| {
            figures.iter().find(|f| name(&f.case) == one && column(&f.case) == *wanted).map_or("".into(), |f| cell(f))
        };
        row(out, [one.clone()].into_iter().chain(columns.iter().map(of)));
    }
    out.push('\n');
}

fn head(out: &mut String, report: &Report) {
    let Report { version, commit, date, command, seconds, .. } = report;
    let _ = writeln!(out, "# softhash {version}, measured\n\n{date}, commit {commit}, {seconds:.0} s: `{command}`\n");
    row(out, ["device", "what it is", "driver", "copy GB/s", "read GB/s"].map(String::from));
    out.push_str("|---|---|---|---|---|\n");
    for subject in &report.devices {
        let o = &subject.origin;
        let rate = |rate: f64| format!("{:.1}", rate * 1e-9);
        let what = format!("{}, {}", o.device, o.backend);
        row(
            out,
            [
                subject.asked.clone(),
                what,
                o.driver.clone(),
                rate(o.copy_bytes_per_second),
                rate(o.read_bytes_per_second),
            ],
        );
    }
    if let Some(peers) = &report.peers {
        let rate = peers.copy_bytes_per_second.map_or("".into(), |rate| format!("{:.1}", rate * 1e-9));
        row(out, [DEVICE.into(), peers.device.clone(), peers.software.clone(), rate, "".into()]);
    }
    out.push_str(
        "\nA copy counts bytes read and written. Every figure is a median and was checked before it was timed. Behind a time, \
         as a percentage, the part of it that its least bytes (each input read once, each result written once) take at \
         the faster of the two rates. `graph`: replays of a CUDA graph; `gpu`: the GPU's clock; `wall`: the host's.\n\n",
    );
    report.missing.iter().for_each(|line| {
        let _ = writeln!(out, "- Not here: {line}");
    });
    if !report.missing.is_empty() {
        out.push('\n');
    }
}

/// A time and its part of the byte bound, or why there is none.
fn cell(figure: &Figure) -> String {
    match &figure.outcome {
        Outcome::Measured(m) => match m.fraction_of_bound {
            Some(fraction) => format!("{} · {:.0}%", time(m.median_seconds), fraction * 100.0),
            None => time(m.median_seconds),
        },
        Outcome::Wrong { .. } => "**wrong**".into(),
        Outcome::Failed { .. } => "failed".into(),
        Outcome::LeftOut { .. } => "left out".into(),
    }
}

fn name(what: &str) -> &str {
    match what {
        "socket" => "SOCKET 480 bits",
        "sign128" => "128 bits",
        "sign128-group" => "128 bits, per group",
        other => other,
    }
}

/// The figures of a table on one device.
fn on<'a>(report: &'a Report, table: Table, device: &str) -> Vec<&'a Figure> {
    report.of(table).filter(|f| f.case.device == device).collect()
}

/// Rows in the order of their size, and the columns of `decode`.
fn in_order(mut figures: Vec<&Figure>) -> Vec<&Figure> {
    let rank = |what: &str| super::decode::ALL.iter().position(|w| *w == what);
    figures.sort_by_key(|f| (f.case.tokens, rank(&f.case.what)));
    figures
}

fn clocks(figures: &[&Figure]) -> String {
    let mut clocks: Vec<_> = figures.iter().filter_map(|f| f.measured()).map(|m| m.clock).collect();
    clocks.sort_unstable();
    clocks.dedup();
    if clocks.is_empty() { "not measured".into() } else { clocks.join(", ") }
}

/// As [`cell`], and how many times faster than the best dense attention of the run.
fn against(report: &Report, figure: &Figure) -> String {
    let best = report.best_dense(&figure.case).and_then(Figure::seconds);
    match (figure.seconds(), best) {
        (Some(seconds), Some(best)) => format!("{} · {:.2}x", cell(figure), best / seconds),
        _ => cell(figure),
    }
}

fn decode(out: &mut String, report: &Report) {
    let mut heads: Vec<_> = report.of(Table::Decode).map(|f| (f.case.heads, f.case.head_dim)).collect();
    heads.sort_by_key(|&((q, kv), dim)| (dim, q, kv));
    heads.dedup();
    for ((q, kv), dim) in heads {
        let of = |device: &str| -> Vec<&Figure> {
            let all = on(report, Table::Decode, device);
            in_order(all.into_iter().filter(|f| (f.case.heads, f.case.head_dim) == ((q, kv), dim)).collect())
        };
        for subject in &report.devices {
            let figures = of(&subject.asked);
            if figures.is_empty() {
                continue;
            }
            let _ = writeln!(out, "## Decoding, {q}/{kv} heads, D = {dim}, bf16: {}\n", subject.asked);
            let _ = writeln!(
                out,
                "One query token, batch 1 ({}); behind the bound, the speed against the best exact attention of this run.\n",
                clocks(&figures)
            );
            pivot(out, "keys", &figures, |c| count(c.tokens), |c| name(&c.what).into(), |f| against(report, f));
        }
        let peers = of(DEVICE);
        if !peers.is_empty() {
            let _ = writeln!(out, "## Decoding, {q}/{kv} heads, D = {dim}, bf16: peers\n");
            pivot(out, "keys", &peers, |c| count(c.tokens), |c| c.what.clone(), cell);
        }
    }
}

fn others(out: &mut String, report: &Report, table: Table) {
    let all: Vec<&Figure> = report.of(table).collect();
    let Some(first) = all.first().map(|f| &f.case) else { return };
    let (q, kv) = first.heads;
    let _ = match table {
        Table::Ragged => {
            writeln!(out, "## A batch of {} up to {} keys, {q}/{kv} heads\n", first.batch, count(first.tokens))
        }
        _ => writeln!(out, "## Other head dimensions at {} keys, {q}/{kv} heads\n", count(first.tokens)),
    };
    let own: Vec<&Figure> = all.iter().copied().filter(|f| f.case.device != DEVICE).collect();
    let label = |c: &Case| format!("{}, D = {}", c.device, c.head_dim);
    pivot(out, "device", &in_order_of_devices(report, own), label, |c| name(&c.what).into(), |f| against(report, f));
    let peers: Vec<&Figure> = all.into_iter().filter(|f| f.case.device == DEVICE).collect();
    if !peers.is_empty() {
        pivot(out, "peers", &peers, |c| format!("D = {}", c.head_dim), |c| c.what.clone(), cell);
    }
}

fn in_order_of_devices<'a>(report: &Report, mut figures: Vec<&'a Figure>) -> Vec<&'a Figure> {
    let place = |device: &str| report.devices.iter().position(|d| d.asked == device);
    let rank = |what: &str| super::decode::ALL.iter().position(|w| *w == what);
    figures.sort_by_key(|f| (place(&f.case.device), f.case.head_dim, rank(&f.case.what)));
    figures
}

fn append(out: &mut String, report: &Report) {
    let all: Vec<&Figure> = report.of(Table::Append).collect();
    let Some(first) = all.first().map(|f| &f.case) else { return };
    let (q, kv) = first.heads;
    let _ = writeln!(out, "## Appending, {q}/{kv} heads, D = {}, bf16: storing and hashing\n", first.head_dim);
    let column = |c: &Case| match c.tokens {
        1 => format!("{}, one token", name(&c.what)),
        n => format!("{}, {} tokens", name(&c.what), count(n)),
    };
    pivot(out, "device", &all, |c| c.device.clone(), column, cell);
}

fn race(out: &mut String, report: &Report) {
    for subject in &report.devices {
        for dtype in ["bf16", "f32"] {
            let mut figures = on(report, Table::Race, &subject.asked);
            figures.retain(|f| f.case.dtype == dtype);
            let Some(first) = figures.first().map(|f| &f.case) else { continue };
            let sums = both(&figures);
            let mut all: Vec<&Figure> = figures.iter().copied().chain(&sums).collect();
            if dtype == "bf16" && report.peers.as_ref().is_some_and(|p| p.device == subject.hardware()) {
                all.extend(on(report, Table::Race, DEVICE));
            }
            all.sort_by_key(|f| f.case.tokens);
            let _ = writeln!(
                out,
                "## RACE, {} heads of {} channels, {dtype}: {}\n",
                first.heads.0, first.head_dim, subject.asked
            );
            let calls = figures.iter().filter_map(|f| f.measured()).map(|m| m.calls).max().unwrap_or(1);
            let cut = if calls > 1 { format!("; the longest in {calls} calls") } else { String::new() };
            let _ = writeln!(out, "Batch 1 ({}){cut}.\n", clocks(&figures));
            for stage in ["forward", "backward", "both"] {
                let of: Vec<&Figure> = all.iter().copied().filter(|f| f.case.stage == stage).collect();
                pivot(out, stage, &of, |c| count(c.tokens), |c| c.what.clone(), cell);
            }
        }
    }
}

/// Forward and backward added up.
fn both(figures: &[&Figure]) -> Vec<Figure> {
    let forward = figures.iter().filter(|f| f.case.stage == "forward");
    let sum = |forward: &&Figure| {
        let case = Case { stage: "backward", ..forward.case.clone() };
        let backward = figures.iter().find(|f| f.case == case)?;
        let (a, b) = (forward.measured()?, backward.measured()?);
        let mut sum = a.clone();
        sum.median_seconds += b.median_seconds;
        let bound = |m: &super::figure::Measured| Some(m.fraction_of_bound? * m.median_seconds);
        sum.fraction_of_bound = Some((bound(a)? + bound(b)?) / sum.median_seconds);
        Some(Figure {
            case: Case { stage: "both", ..case },
            at_seconds: forward.at_seconds,
            outcome: Outcome::Measured(sum),
        })
    };
    forward.filter_map(sum).collect()
}

fn steps(out: &mut String, report: &Report) {
    let all: Vec<&Figure> = report.of(Table::RaceStep).collect();
    let Some(first) = all.first().map(|f| &f.case) else { return };
    let _ = writeln!(out, "## RACE, one token, {} heads of {} channels, bf16\n", first.heads.0, first.head_dim);
    let column = |c: &Case| format!("{}, batch {} × {}", c.what, c.batch, c.heads.0);
    pivot(out, "device", &all, |c| c.device.clone(), column, cell);
}

fn notes(out: &mut String, report: &Report) {
    if !report.verdicts.is_empty() {
        out.push_str("## Where sparse attention loses\n\n");
        report.verdicts.iter().for_each(|line| {
            let _ = writeln!(out, "- {line}");
        });
        out.push('\n');
    }
    let mut why: Vec<String> = Vec::new();
    for Figure { case, outcome, .. } in &report.figures {
        let (kind, reason) = match outcome {
            Outcome::Measured(_) => continue,
            Outcome::Wrong { why } => ("wrong", why),
            Outcome::Failed { why } => ("failed", why),
            Outcome::LeftOut { why } => ("left out", why),
        };
        let Case { table, device, .. } = case;
        let line = format!("{device}, {table:?}, {kind}: {reason}");
        if !why.contains(&line) {
            why.push(line);
        }
    }
    if !why.is_empty() {
        out.push_str("## What has no figure\n\n");
        why.iter().for_each(|line| {
            let _ = writeln!(out, "- {line}");
        });
    }
}
