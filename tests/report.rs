//! The report as a script sees it: a small run on the CPU and on a GPU, and what it leaves behind.
#![cfg(feature = "wgpu")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common {
    pub mod device;
}
#[path = "../benches/report/main.rs"]
mod report;

use clap::Parser;
use serde_json::Value;
use std::collections::HashSet;
use std::path::Path;

/// Runs the report with `arguments` and a folder; whether all was right.
fn run(folder: &Path, arguments: &[&str]) -> bool {
    let out = folder.to_str().unwrap();
    let all = ["report", "--quick", "--commit", "abc1234", "--out", out].into_iter().chain(arguments.iter().copied());
    report::run(&report::Arguments::try_parse_from(all).unwrap()).unwrap()
}

fn json(folder: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(folder.join("report.json")).unwrap()).unwrap()
}

/// (table, device, what, stage, tokens) of all figures with a time.
fn measured(report: &Value) -> HashSet<(String, String, String, String, u64)> {
    let text = |v: &Value| v.as_str().unwrap().to_string();
    let figures = report["figures"].as_array().unwrap().iter();
    let measured = figures.filter(|f| f["outcome"] == "measured" && f["median_seconds"].as_f64().unwrap() > 0.0);
    measured
        .map(|f| {
            (text(&f["table"]), text(&f["device"]), text(&f["what"]), text(&f["stage"]), f["tokens"].as_u64().unwrap())
        })
        .collect()
}

/// Tags open and close, texts are escaped, and no number is missing.
fn check_svg(path: &Path) {
    let text = std::fs::read_to_string(path).unwrap();
    let mut open = Vec::new();
    assert!(text.starts_with("<svg"), "{}", path.display());
    for tag in text.split('<').skip(1) {
        let (tag, rest) = tag.split_once('>').unwrap_or_else(|| panic!("{tag:?} is cut off"));
        assert!(!rest.contains('>'), "{rest:?} is not escaped");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name), "{}", path.display());
        } else if !tag.ends_with('/') {
            open.push(tag.split_whitespace().next().unwrap());
        }
    }
    assert!(open.is_empty(), "{open:?} of {} are open", path.display());
    assert!(!text.contains("NaN") && !text.contains("inf"), "{} has a point nowhere", path.display());
}

#[test]
fn a_small_report_has_all_that_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let device = common::device::gpu().report();
    let gpu = std::env::var("SOFTHASH_TEST_DEVICE").unwrap_or_else(|_| "llvmpipe".into());
    assert!(run(folder.path(), &["--device", "cpu", "--device", &gpu, "--device", "no such adapter"]));
    let report = json(folder.path());
    assert_eq!(report["commit"], "abc1234");
    let found = measured(&report);
    for device in ["cpu", gpu.as_str()] {
        for what in ["dense", "socket", "sign128", "sign128-group"] {
            let has = |table: &str, tokens| {
                let figure = (table.into(), device.into(), what.into(), "decode".into(), tokens);
                assert!(found.contains(&figure), "{figure:?} is not there: {report:#}");
            };
            has("decode", 2048);
            has("decode", 4096);
            has("ragged", 2048);
            has("head-dims", 2048);
        }
        for (table, what, stage, tokens) in [
            ("append", "socket", "append", 2048),
            ("append", "sign128", "append", 1),
            ("race", "P2 L2", "forward", 256),
            ("race", "P2 L2", "backward", 512),
            ("race-step", "P4 L4", "step", 1),
        ] {
            let figure = (table.into(), device.into(), what.into(), stage.into(), tokens);
            assert!(found.contains(&figure), "{figure:?} is not there: {report:#}");
        }
    }
    let missing = report["missing"].as_array().unwrap();
    assert!(missing.len() == 1 && missing[0].as_str().unwrap().starts_with("no such adapter: "), "{missing:?}");
    for named in report["devices"].as_array().unwrap() {
        assert!(named["copy_bytes_per_second"].as_f64().unwrap() > 0.0, "{named}");
        assert!(named["read_bytes_per_second"].as_f64().unwrap() > 0.0, "{named}");
    }

    let text = std::fs::read_to_string(folder.path().join("report.md")).unwrap();
    for line in [
        "commit abc1234",
        "- Not here: no such adapter: ",
        "## Decoding, 4/2 heads, D = 64, bf16: cpu",
        "| keys | dense | SOCKET 480 bits | 128 bits | 128 bits, per group |",
        "| 4K | ",
        "## Where sparse attention loses",
        "cpu, 2/2 heads, socket: ",
        "## RACE, 4 heads of 64 channels, f32: cpu",
        "| both | P2 L2 |",
    ] {
        assert!(text.contains(line), "{line:?} is not in\n{text}");
    }
    if let Some(gpu) = &device.gpu {
        assert!(text.contains(&gpu.adapter) && text.contains(&gpu.driver), "{text}");
    }
    for row in text.lines().filter(|line| line.starts_with('|')).collect::<Vec<_>>().windows(2) {
        let cells = |row: &str| row.matches('|').count();
        // A separator has as many cells as the header above it.
        assert!(!row[1].starts_with("|---") || cells(row[0]) == cells(row[1]), "{row:?}");
    }
    for plot in ["decode-4-2", "decode-2-2-bound", "race-forward-bf16", "race-backward-f32-bound"] {
        check_svg(&folder.path().join(format!("{plot}.svg")));
    }
    let plot = std::fs::read_to_string(folder.path().join("decode-4-2.svg")).unwrap();
    for word in ["dense, cpu", &format!("sign128-group, {gpu}"), "4K", "keys", "Decoding one token, 4/2 heads"] {
        assert!(plot.contains(word), "{word:?} is not drawn");
    }
}

#[test]
fn a_wrong_result_is_told_from_one_that_fails() {
    use report::support::{data::Problem, judge, outcome::Wrong};
    use softhash::{DecodeOptions, Device, Mode, SocketCache, SocketConfig};
    let mut problem = Problem::ragged(2, 2, 64, vec![1500, 2048]);
    let mut cache = SocketCache::new(&Device::cpu(), SocketConfig::fast(), problem.shape(), 2).unwrap();
    problem.fill(&mut cache);
    for mode in [Mode::Dense, Mode::Sparse] {
        let options = DecodeOptions { mode, ..DecodeOptions::default() };
        judge::check(&mut cache, &mut problem, &options).unwrap();
        // Attention with another scale is not what the judge computes.
        let other = DecodeOptions { scale: Some(0.5), ..options };
        assert!(judge::check(&mut cache, &mut problem, &other).is_err_and(|error| error.is::<Wrong>()));
    }
    // One key more than the judge knows of.
    let [k, v] = problem.keys_values(0, 7..8).unwrap();
    cache.append_to(1, &k.view().unwrap(), &v.view().unwrap()).unwrap();
    let dense = DecodeOptions { mode: Mode::Dense, ..DecodeOptions::default() };
    assert!(judge::check(&mut cache, &mut problem, &dense).is_err_and(|error| error.is::<Wrong>()));
    // A cache of another shape fails, which says nothing of its results.
    let mut other = SocketCache::new(&Device::cpu(), SocketConfig::fast(), problem.shape(), 1).unwrap();
    assert!(judge::check(&mut other, &mut problem, &dense).is_err_and(|error| !error.is::<Wrong>()));
}

#[test]
fn only_what_is_asked_for_is_measured_and_only_while_there_is_time() {
    let folder = tempfile::tempdir().unwrap();
    let only = ["--device", "cpu", "--only", "race-step,decode", "--heads", "2/2", "--lengths", "2048"];
    assert!(run(folder.path(), &only));
    let tables: HashSet<_> = measured(&json(folder.path())).into_iter().map(|f| f.0).collect();
    assert_eq!(tables, HashSet::from(["decode".to_string(), "race-step".to_string()]));

    let folder = tempfile::tempdir().unwrap();
    assert!(run(folder.path(), &["--device", "cpu", "--time-limit", "0"]));
    let report = json(folder.path());
    assert!(measured(&report).is_empty());
    let figures = report["figures"].as_array().unwrap();
    assert!(figures.len() > 20 && figures.iter().all(|f| f["outcome"] == "left-out"), "{figures:?}");
    assert!(std::fs::read_to_string(folder.path().join("report.md")).unwrap().contains("left out: the time limit"));
}

#[test]
fn peers_stand_beside_the_figures_of_their_device() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("peers.json");
    // The CPU's name as the report has it, so that they are on the same hardware.
    let threads = softhash::Device::cpu().report().threads;
    let record = |peer: &str, tokens: u64, seconds: f64| serde_json::json!({"stage": "decode", "peer": peer, "heads": [2, 2], "head_dim": 64, "tokens": tokens, "seconds": seconds});
    let file = serde_json::json!({
        "device": format!("CPU, {threads} threads"), "software": "Peer 1.0", "copy_bytes_per_second": 1e9,
        "records": [record("fast", 2048, 1e-9), record("slow", 2048, 1.0)],
    });
    std::fs::write(&path, file.to_string()).unwrap();
    let peers = path.to_str().unwrap();
    let of = ["--device", "cpu", "--only", "decode", "--heads", "2/2", "--lengths", "2048"];
    let only = [&of[..], &["--vendor", peers, "--vendor", "no such file"]].concat();
    assert!(run(folder.path(), &only));
    let report = json(folder.path());
    // Nothing is faster than a nanosecond.
    let verdicts = report["verdicts"].to_string();
    assert!(verdicts.contains("socket: loses at every length (2K); 0.0x at 2K, against fast."), "{verdicts}");
    assert_eq!(report["missing"].as_array().unwrap().len(), 1);
    let text = std::fs::read_to_string(folder.path().join("report.md")).unwrap();
    assert!(text.contains("Peer 1.0") && text.contains("| keys | fast | slow |"), "{text}");
    check_svg(&folder.path().join("decode-2-2.svg"));
}
