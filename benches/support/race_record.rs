//! Figures of RACE, and where they came from.

use super::origin::Origin;
use super::race_layer::Size;
use serde::Serialize;
use softhash::{DType, Device};

#[derive(Clone, Serialize)]
pub struct Record {
    /// `dense`, or P and L of RACE.
    pub attention: String,
    pub stage: &'static str,
    pub heads: usize,
    pub head_dim: usize,
    pub dtype: DType,
    pub tokens: u64,
    /// Tokens of a call at most.
    pub segment: u64,
    /// `gpu` or `wall`.
    pub clock: &'static str,
    /// Bytes that must move at least: inputs once, results once; 0 where that is not the measure.
    pub bytes: u64,
    pub median_seconds: f64,
    pub least_seconds: f64,
    pub samples: usize,
    pub tokens_per_second: f64,
    pub bytes_per_second: f64,
    /// Of the measured copy.
    pub fraction_of_copy: f64,
}

impl Record {
    pub fn new(attention: &str, stage: &'static str, size: &Size, bytes: u64) -> Self {
        Self {
            attention: attention.into(),
            stage,
            heads: size.heads,
            head_dim: size.channels,
            dtype: size.dtype,
            tokens: size.tokens,
            segment: size.segment.min(size.tokens),
            clock: "wall",
            bytes,
            median_seconds: 0.0,
            least_seconds: 0.0,
            samples: 0,
            tokens_per_second: 0.0,
            bytes_per_second: 0.0,
            fraction_of_copy: 0.0,
        }
    }
}

#[derive(Serialize)]
pub struct Run {
    #[serde(flatten)]
    origin: Origin,
    records: Vec<Record>,
    notes: Vec<String>,
    #[serde(skip)]
    filter: Option<String>,
}

impl Run {
    pub fn new(device: &Device, filter: Option<String>) -> Self {
        Self { origin: Origin::new(device), records: Vec::new(), notes: Vec::new(), filter }
    }

    pub fn wanted(&self, record: &Record) -> bool {
        let name = format!("{} {} {:?} {}", record.attention, record.stage, record.dtype, record.tokens);
        self.filter.as_ref().is_none_or(|f| name.contains(f))
    }

    /// The median.
    pub fn add(&mut self, mut record: Record, mut samples: Vec<f64>) -> f64 {
        samples.sort_by(f64::total_cmp);
        record.samples = samples.len();
        record.least_seconds = samples[0];
        record.median_seconds = samples[samples.len() / 2];
        record.tokens_per_second = record.tokens as f64 / record.median_seconds;
        record.bytes_per_second = record.bytes as f64 / record.median_seconds;
        record.fraction_of_copy = record.bytes_per_second / self.origin.copy_bytes_per_second;
        let median = record.median_seconds;
        eprintln!("{} {} {:?} {}: {median:.3e} s", record.attention, record.stage, record.dtype, record.tokens);
        self.records.push(record);
        median
    }

    pub fn say(&mut self, note: String) {
        self.notes.push(note);
    }

    pub fn print(&self) {
        self.origin.print();
        println!(
            "| heads | D | dtype | tokens | calls | attention | stage | clock | median ms | least ms | Mtokens/s | GB/s | of copy |"
        );
        println!("|---|---|---|---|---|---|---|---|---|---|---|---|---|");
        for r in &self.records {
            let rate = match r.bytes {
                0 => "| | |".into(),
                _ => format!("| {:.2} | {:.3} |", r.bytes_per_second * 1e-9, r.fraction_of_copy),
            };
            println!(
                "| {} | {} | {:?} | {} | {} | {} | {} | {} | {:.3} | {:.3} | {:.3} {rate}",
                r.heads,
                r.head_dim,
                r.dtype,
                r.tokens,
                r.tokens.div_ceil(r.segment),
                r.attention,
                r.stage,
                r.clock,
                r.median_seconds * 1e3,
                r.least_seconds * 1e3,
                r.tokens_per_second * 1e-6
            );
        }
        self.notes.iter().for_each(|note| println!("{note}"));
    }

    pub fn json(&self) -> String {
        serde_json::to_string_pretty(self).unwrap()
    }
}
