//! What was measured, on what, and what it came to.

use super::support::origin::Origin;
use serde::Serialize;

/// Which table a figure belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Table {
    /// One query token, dense and sparse, by length.
    Decode,
    /// A batch of sequences of different lengths.
    Ragged,
    /// Other head dimensions.
    HeadDims,
    /// Taking in a prompt, and one token.
    Append,
    /// RACE forward and backward, by length.
    Race,
    /// RACE, one token of every sequence.
    RaceStep,
}

/// What one figure is about.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Case {
    pub table: Table,
    /// As the device was asked for; of peers, the word `peer`.
    pub device: String,
    /// The attention: `dense`, `socket`, `P4 L4`; of peers, their name.
    pub what: String,
    /// decode, append, forward, backward, both or step.
    pub stage: &'static str,
    /// Query and key/value heads.
    pub heads: (usize, usize),
    pub head_dim: usize,
    pub dtype: &'static str,
    pub batch: usize,
    /// Keys of the longest sequence, or tokens.
    pub tokens: u64,
}

/// What it came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "outcome", rename_all = "kebab-case")]
pub enum Outcome {
    Measured(Measured),
    /// The result was wrong, so no time was taken.
    Wrong {
        why: String,
    },
    /// It could not be run.
    Failed {
        why: String,
    },
    /// It was not tried.
    LeftOut {
        why: String,
    },
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Measured {
    /// `graph`: of replays; `gpu`: by the GPU's clock; `wall`: by the host's.
    pub clock: &'static str,
    pub median_seconds: f64,
    pub least_seconds: f64,
    pub samples: usize,
    /// Calls that the tokens were cut into.
    pub calls: u64,
    /// Bytes that must move at least; `None` of peers.
    pub bytes: Option<u64>,
    /// Of the seconds that the bytes take at the faster of the two ceilings.
    pub fraction_of_bound: Option<f64>,
}

#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Figure {
    #[serde(flatten)]
    pub case: Case,
    /// Seconds after the begin of its device's session.
    pub at_seconds: f64,
    #[serde(flatten)]
    pub outcome: Outcome,
}

impl Figure {
    pub fn seconds(&self) -> Option<f64> {
        self.measured().map(|m| m.median_seconds)
    }

    pub fn measured(&self) -> Option<&Measured> {
        match &self.outcome {
            Outcome::Measured(measured) => Some(measured),
            _ => None,
        }
    }

    pub fn fraction(&self) -> Option<f64> {
        self.measured()?.fraction_of_bound
    }
}

/// A device that was measured.
#[derive(Clone, Serialize)]
pub struct Subject {
    /// As it was asked for.
    pub asked: String,
    #[serde(flatten)]
    pub origin: Origin,
}

impl Subject {
    /// The chip, whatever path leads to it.
    pub fn hardware(&self) -> &str {
        match self.origin.device.split_once(' ') {
            Some((prefix, name)) if prefix.starts_with("cuda:") => name,
            _ => &self.origin.device,
        }
    }

    /// Bytes per second that nothing surpasses.
    pub fn ceiling(&self) -> f64 {
        self.origin.copy_bytes_per_second.max(self.origin.read_bytes_per_second)
    }
}

/// Everything of one run.
#[derive(Serialize)]
pub struct Report {
    pub version: &'static str,
    pub commit: String,
    /// UTC.
    pub date: String,
    pub command: String,
    pub seconds: f64,
    pub devices: Vec<Subject>,
    /// Devices and peers that are not there, a line each.
    pub missing: Vec<String>,
    pub peers: Option<super::peers::Origin>,
    pub figures: Vec<Figure>,
    /// Where sparse attention loses.
    pub verdicts: Vec<String>,
}

impl Report {
    /// Figures of `table` that were asked for, in the order they were measured.
    pub fn of(&self, table: Table) -> impl Iterator<Item = &Figure> {
        self.figures.iter().filter(move |figure| figure.case.table == table)
    }

    pub fn is_right(&self) -> bool {
        !self.figures.iter().any(|figure| matches!(figure.outcome, Outcome::Wrong { .. }))
    }

    /// The fastest exact attention of this run on the hardware that `device` is on, for the same problem.
    pub fn best_dense(&self, case: &Case) -> Option<&Figure> {
        let hardware = |device: &str| self.devices.iter().find(|d| d.asked == device).map(Subject::hardware);
        let here = hardware(&case.device)?;
        let peer_here = self.peers.as_ref().is_some_and(|peers| peers.device == here);
        let same = |other: &Case| {
            let place =
                if other.device == super::peers::DEVICE { peer_here } else { hardware(&other.device) == Some(here) };
            place
                && other.table == case.table
                && (other.device == super::peers::DEVICE || other.what == "dense")
                && (other.heads, other.head_dim, other.batch, other.tokens)
                    == (case.heads, case.head_dim, case.batch, case.tokens)
        };
        let times = self.figures.iter().filter(|f| same(&f.case)).filter_map(|f| Some((f, f.seconds()?)));
        times.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(figure, _)| figure)
    }
}

/// Date and time of day, UTC, of seconds since 1970.
pub fn date(unix: u64) -> String {
    let (days, second) = (unix / 86400, unix % 86400);
    // Years of 365.2425 days that begin in March (Hinnant's civil_from_days).
    let z = days + 719_468;
    let (era, day_of_era) = (z / 146_097, z % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02} {:02}:{:02} UTC", second / 3600, second / 60 % 60)
}

/// 65536 as 64K, 1048576 as 1M.
pub fn count(n: u64) -> String {
    match n {
        n if n >= 1 << 20 && n.is_multiple_of(1 << 20) => format!("{}M", n >> 20),
        n if n >= 1 << 10 && n.is_multiple_of(1 << 10) => format!("{}K", n >> 10),
        n => n.to_string(),
    }
}

/// Three digits, in a unit between nanoseconds and seconds.
pub fn time(seconds: f64) -> String {
    let (value, unit) = match seconds {
        s if s < 1e-6 => (s * 1e9, "ns"),
        s if s < 1e-3 => (s * 1e6, "µs"),
        s if s < 1.0 => (s * 1e3, "ms"),
        s => (s, "s"),
    };
    match value {
        v if v < 9.995 => format!("{v:.2} {unit}"),
        v if v < 99.95 => format!("{v:.1} {unit}"),
        v => format!("{v:.0} {unit}"),
    }
}
