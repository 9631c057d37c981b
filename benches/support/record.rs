//! Figures, and where they came from.

use super::data::Problem;
use super::origin::Origin;
use serde::Serialize;
use softhash::Device;

#[derive(Clone, Serialize)]
pub struct Record {
    pub scoring: String,
    pub stage: String,
    pub q_heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    pub keys: usize,
    /// Bytes that must move at least; 0 where that is not the measure of the stage.
    pub bytes: u64,
    pub median_seconds: f64,
    pub least_seconds: f64,
    pub samples: usize,
    pub bytes_per_second: f64,
    /// Of the measured copy.
    pub fraction_of_copy: f64,
}

impl Record {
    pub fn new(scoring: &str, stage: &str, problem: &Problem, bytes: u64) -> Self {
        Self {
            scoring: scoring.into(),
            stage: stage.into(),
            q_heads: problem.q_heads,
            kv_heads: problem.kv_heads,
            head_dim: problem.head_dim,
            keys: problem.keys(),
            bytes,
            median_seconds: 0.0,
            least_seconds: 0.0,
            samples: 0,
            bytes_per_second: 0.0,
            fraction_of_copy: 0.0,
        }
    }

    pub fn group(&self) -> String {
        format!("{} {}q{}kv d{}", self.scoring, self.q_heads, self.kv_heads, self.head_dim)
    }
}

#[derive(Serialize)]
pub struct Run {
    #[serde(flatten)]
    origin: Origin,
    records: Vec<Record>,
    #[serde(skip)]
    filter: Option<String>,
}

impl Run {
    pub fn new(device: &Device, filter: Option<String>) -> Self {
        Self { origin: Origin::new(device), records: Vec::new(), filter }
    }

    pub fn wanted(&self, record: &Record) -> bool {
        let name = format!("{} {}", record.group(), record.stage);
        self.filter.as_ref().is_none_or(|f| name.contains(f))
    }

    pub fn add(&mut self, mut record: Record, mut samples: Vec<f64>) {
        if samples.is_empty() || !self.wanted(&record) {
            return;
        }
        samples.sort_by(f64::total_cmp);
        record.samples = samples.len();
        record.least_seconds = samples[0];
        record.median_seconds = samples[samples.len() / 2];
        record.bytes_per_second = record.bytes as f64 / record.median_seconds;
        record.fraction_of_copy = record.bytes_per_second / self.origin.copy_bytes_per_second;
        self.records.push(record);
    }

    pub fn print(&self) {
        self.origin.print();
        println!("| heads | D | keys | scoring | stage | median µs | least µs | GB/s | of copy |");
        println!("|---|---|---|---|---|---|---|---|---|");
        for r in &self.records {
            let rate = if r.bytes == 0 {
                "| | |".into()
            } else {
                format!("| {:.1} | {:.2} |", r.bytes_per_second * 1e-9, r.fraction_of_copy)
            };
            let (median, least) = (r.median_seconds * 1e6, r.least_seconds * 1e6);
            let heads = format!("{}/{}", r.q_heads, r.kv_heads);
            println!(
                "| {heads} | {} | {} | {} | {} | {median:.1} | {least:.1} {rate}",
                r.head_dim, r.keys, r.scoring, r.stage
            );
        }
    }

    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap()
    }
}
