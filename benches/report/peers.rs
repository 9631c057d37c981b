//! What a user would take instead, from files of `benches/vendor_dense.py` and of `peers.py`, or by running the former.

use super::figure::{Case, Figure, Measured, Outcome, Table};
use super::support::outcome::Outcome as Trial;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::process::Command;

/// The device of their figures.
pub const DEVICE: &str = "peer";

/// What measured them.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Origin {
    /// The GPU's name, without what leads to it; empty where the file does not say.
    pub device: String,
    pub software: String,
    pub copy_bytes_per_second: Option<f64>,
}

/// A file of `benches/vendor_dense.py`.
#[derive(Deserialize)]
struct File {
    device: String,
    software: String,
    copy_bytes_per_second: f64,
    records: Vec<Record>,
}

#[derive(Deserialize)]
struct Record {
    peer: String,
    stage: String,
    heads: (usize, usize),
    head_dim: usize,
    tokens: u64,
    seconds: f64,
}

#[derive(Default)]
pub struct Peers {
    /// Channels of a head in the table by length; others go to that of head dimensions.
    pub head_dim: usize,
    pub origin: Option<Origin>,
    pub figures: Vec<Figure>,
    pub missing: Vec<String>,
}

impl Peers {
    /// Takes in a file, or where `source` is `measure` runs the script for at most `seconds`.
    pub fn add(&mut self, source: &str, arguments: &[String], seconds: f64) {
        let text = match source {
            "measure" => run(arguments, seconds),
            path => std::fs::read_to_string(path).map_err(Into::into),
        };
        if let Err(error) = text.and_then(|text| self.read(&text)) {
            let line = error.to_string().lines().last().unwrap_or_default().to_string();
            self.missing.push(format!("peers ({source}): {line}"));
        }
    }

    pub fn read(&mut self, text: &str) -> Trial<()> {
        let origin = self.origin.get_or_insert_default();
        let value: Value = serde_json::from_str(text)?;
        let Value::Array(rows) = value else {
            let file: File = serde_json::from_value(value)?;
            (origin.device, origin.software) = (file.device, file.software);
            origin.copy_bytes_per_second = Some(file.copy_bytes_per_second);
            self.figures.extend(file.records.iter().filter_map(|record| record.figure(self.head_dim)));
            return Ok(());
        };
        self.figures.extend(rows.iter().flat_map(of_row).filter_map(|record| record.figure(self.head_dim)));
        Ok(())
    }
}

impl Record {
    fn figure(&self, head_dim: usize) -> Option<Figure> {
        let (table, stage) = match self.stage.as_str() {
            "decode" if self.head_dim == head_dim => (Table::Decode, "decode"),
            "decode" => (Table::HeadDims, "decode"),
            "forward" => (Table::Race, "forward"),
            "both" => (Table::Race, "both"),
            _ => return None,
        };
        let case = Case {
            table,
            device: DEVICE.into(),
            what: self.peer.clone(),
            stage,
            heads: self.heads,
            head_dim: self.head_dim,
            dtype: "bf16",
            batch: 1,
            tokens: self.tokens,
        };
        let measured = Measured {
            clock: "gpu",
            median_seconds: self.seconds,
            least_seconds: self.seconds,
            samples: 1,
            calls: 1,
            bytes: None,
            fraction_of_bound: None,
        };
        Some(Figure { case, at_seconds: 0.0, outcome: Outcome::Measured(measured) })
    }
}

/// Records of one row of `peers.py`, whose sections B and E are decoding and linear attention.
fn of_row(row: &Value) -> Vec<Record> {
    let tokens = || {
        let text = row["T"].as_str()?;
        let (number, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        let scale = if unit == "M" { 1 << 20 } else { 1 << 10 };
        Some((number.parse::<f64>().ok()? * f64::from(scale)) as u64)
    };
    let Some(tokens) = tokens() else { return Vec::new() };
    let heads = || {
        let (q, kv) = row["heads"].as_str()?.split_once('/')?;
        Some((q.parse().ok()?, kv.parse().ok()?))
    };
    let (names, heads): (&[(&str, &str, &str)], _) = match row["sec"].as_str() {
        Some("B") => (
            &[
                ("default_ms", "torch", "decode"),
                ("cudnn_ms", "cuDNN", "decode"),
                ("flash_ms", "flash", "decode"),
                ("triton_ms", "Triton", "decode"),
            ],
            heads(),
        ),
        Some("E") => (&[("fwd_ms", "fla", "forward"), ("fwdbwd_ms", "fla", "both")], Some((4, 4))),
        _ => return Vec::new(),
    };
    let record = |&(key, peer, stage): &(&str, &str, &str)| {
        let (seconds, heads) = (row[key].as_f64()? * 1e-3, heads?);
        Some(Record { peer: peer.into(), stage: stage.into(), heads, head_dim: 128, tokens, seconds })
    };
    names.iter().filter_map(record).collect()
}

/// The script that measures them, so that this program can be carried alone.
const SCRIPT: &str = include_str!("../vendor_dense.py");

fn run(arguments: &[String], seconds: f64) -> Trial<String> {
    let file = std::env::temp_dir().join(format!("softhash-peers-{}.json", std::process::id()));
    let mut command = Command::new("python3");
    command.args(["-c", SCRIPT]).args(arguments).args(["--seconds", &seconds.to_string(), "--json"]).arg(&file);
    let output = command.output().map_err(|error| format!("python3: {error}"))?;
    let text = std::fs::read_to_string(&file);
    let _ = std::fs::remove_file(&file);
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).trim().into());
    }
    Ok(text?)
}
