//! Measuring on one device within the time there is.

use super::figure::{Case, Figure, Measured, Outcome, Subject, Table};
use super::support::clock::{Clock, Patience, samples};
use super::support::outcome::{Outcome as Trial, Wrong};
use super::support::step::Step;
use indicatif::ProgressBar;
use softhash::Device;
use std::time::{Duration, Instant};

/// Why something was left out when time ran short.
const TIME: &str = "the time limit";

pub struct Session<'a> {
    pub device: Device,
    pub clock: Clock,
    pub asked: String,
    ceiling: f64,
    patience: Patience,
    start: Instant,
    deadline: Option<Instant>,
    /// When this table's share of the time ends.
    share: Option<Instant>,
    figures: &'a mut Vec<Figure>,
    bar: &'a ProgressBar,
}

impl<'a> Session<'a> {
    pub fn new(
        device: Device,
        subject: &Subject,
        seconds: f64,
        deadline: Option<Instant>,
        figures: &'a mut Vec<Figure>,
        bar: &'a ProgressBar,
    ) -> Trial<Self> {
        Ok(Self {
            clock: Clock::new(&device)?,
            patience: Patience::new(&device, seconds),
            device,
            asked: subject.asked.clone(),
            ceiling: subject.ceiling(),
            start: Instant::now(),
            deadline,
            share: deadline,
            figures,
            bar,
        })
    }

    /// Whether it computes on the CPU, one way or the other: then all is slow, and caches are small.
    pub fn is_software(&self) -> bool {
        self.device.is_cpu() || self.device.report().gpu.is_some_and(|gpu| gpu.software)
    }

    /// Whether there is a limit to its time.
    pub fn is_limited(&self) -> bool {
        self.deadline.is_some()
    }

    /// Gives what follows this part of the time that is left.
    pub fn take_share(&mut self, part: f64) {
        let left = |deadline: Instant| deadline.saturating_duration_since(Instant::now());
        self.share = self.deadline.map(|deadline| Instant::now() + left(deadline).mul_f64(part));
    }

    /// Whether nothing more is to be begun, whatever its share.
    pub fn is_over(&self) -> bool {
        self.deadline.is_some_and(|deadline| Instant::now() >= deadline)
    }

    /// Whether something that takes about `seconds` can be begun.
    pub fn has_room(&self, seconds: f64) -> bool {
        let seconds = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        self.share.is_none_or(|share| share.saturating_duration_since(Instant::now()) > seconds)
    }

    pub fn case(&self, table: Table, what: &str, stage: &'static str) -> Case {
        let device = self.asked.clone();
        Case { table, device, what: what.into(), stage, heads: (0, 0), head_dim: 0, dtype: "bf16", batch: 1, tokens: 0 }
    }

    pub fn leave_out(&mut self, case: Case) {
        self.push(case, Outcome::LeftOut { why: TIME.into() });
    }

    pub fn fail(&mut self, case: Case, error: &(dyn std::error::Error + 'static)) {
        let why = error.to_string().lines().next().unwrap_or_default().to_string();
        let outcome = if error.is::<Wrong>() { Outcome::Wrong { why } } else { Outcome::Failed { why } };
        self.push(case, outcome);
    }

    /// Measures `once`, whose result was checked, and that moves `bytes` at least in `calls` calls.
    pub fn measure(&mut self, case: Case, bytes: u64, calls: u64, mut once: impl FnMut(&Clock) -> Trial<f64>) {
        let taken = samples(self.patience, &self.clock, || once(&self.clock));
        let clock = self.clock.name();
        self.file(case, bytes, calls, clock, taken);
    }

    /// As [`Session::measure`] of a step that reads `clock`.
    pub fn measure_step(&mut self, case: Case, bytes: u64, clock: &Clock, step: Trial<Step<'_>>) {
        let taken = step.and_then(|mut step| Ok((step.graph, samples(self.patience, clock, &mut step.seconds)?)));
        match taken {
            Ok((graph, seconds)) => {
                let clock = if graph { "graph" } else { clock.name() };
                self.file(case, bytes, 1, clock, Ok(seconds));
            }
            Err(error) => self.fail(case, &*error),
        }
    }

    fn file(&mut self, case: Case, bytes: u64, calls: u64, clock: &'static str, seconds: Trial<Vec<f64>>) {
        let mut seconds = match seconds {
            Ok(seconds) => seconds,
            Err(error) => return self.fail(case, &*error),
        };
        seconds.sort_by(f64::total_cmp);
        let median_seconds = seconds[seconds.len() / 2];
        let measured = Measured {
            clock,
            median_seconds,
            least_seconds: seconds[0],
            samples: seconds.len(),
            calls,
            bytes: Some(bytes),
            fraction_of_bound: Some(bytes as f64 / self.ceiling / median_seconds),
        };
        self.push(case, Outcome::Measured(measured));
    }

    fn push(&mut self, case: Case, outcome: Outcome) {
        self.bar.set_message(format!("{} {:?} {}", case.device, case.table, case.what));
        self.bar.inc(1);
        self.figures.push(Figure { case, at_seconds: self.start.elapsed().as_secs_f64(), outcome });
    }
}
