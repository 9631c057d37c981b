//! Checks golden cases against the library and against its f64 reference.
//!
//! One line per checked tensor. Exit code 0 where everything passes, 1 on any FAIL, 2 on a file that cannot be read or
//! is of no known kind.

mod suite;

use clap::Parser;
use softhash::Device;
use std::{collections::BTreeSet, path::PathBuf, process::ExitCode};
use suite::fixture::Fixture;

#[derive(Parser)]
struct Arguments {
    /// `cpu`, `auto`, or part of a GPU adapter's name.
    #[arg(long, default_value = "cpu")]
    device: String,
    /// Fixture files. A `_kv` or `_in` file stands for the cases that it completes.
    #[arg(required = true)]
    files: Vec<PathBuf>,
}

fn open_device(name: &str) -> softhash::Result<Device> {
    match name {
        "cpu" => Ok(Device::cpu()),
        "auto" => Device::auto(),
        part => Device::by_name(part),
    }
}

/// Replaces a `_kv` or `_in` companion by its cases, so that each case is judged once.
fn case_paths(path: PathBuf) -> Vec<PathBuf> {
    let stem = path.file_stem().map(|s| s.to_string_lossy().into_owned()).unwrap_or_default();
    if let Some(stem) = stem.strip_suffix("_kv") {
        return vec![path.with_file_name(format!("{stem}.safetensors"))];
    }
    let Some(stem) = stem.strip_suffix("_in") else { return vec![path] };
    let named = |mode| path.with_file_name(format!("{stem}_{mode}.safetensors"));
    let modes = ["ratio_causal", "ratio_full", "bucket_mean_causal", "bucket_mean_full"];
    let cases: Vec<_> = modes.map(named).into_iter().filter(|path| path.exists()).collect();
    // Inputs without results are of no known kind, which reading them will say.
    if cases.is_empty() { vec![path] } else { cases }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let device = match open_device(&arguments.device) {
        Ok(device) => device,
        Err(error) => {
            eprintln!("{error}");
            return ExitCode::from(2);
        }
    };
    println!("{}", device.report());
    let (mut passed, mut failed, mut unreadable) = (0usize, 0usize, 0usize);
    let mut seen = BTreeSet::new();
    for path in arguments.files.into_iter().flat_map(case_paths) {
        if !seen.insert(path.clone()) {
            continue;
        }
        match Fixture::read(&path).and_then(|case| suite::judge(&device, &case)) {
            Ok(checks) => {
                for check in checks {
                    println!("{check}");
                    *(if check.passes() { &mut passed } else { &mut failed }) += 1;
                }
            }
            Err(failure) => {
                println!("{}: unreadable: {failure}", path.display());
                unreadable += 1;
            }
        }
    }
    println!("{passed} passed, {failed} failed, {unreadable} files unreadable");
    ExitCode::from(match (failed, unreadable) {
        (1.., _) => 1,
        (0, 1..) => 2,
        (0, 0) => 0,
    })
}
