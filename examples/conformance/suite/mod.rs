//! Judging fixture files: shared by the conformance example and the golden tests.

pub mod fixture;
mod hash;
mod race;
mod sign;
mod socket;
mod step;

use fixture::{Array, Failure, Fixture, Result, unfit};
use softhash::Device;

/// One checked tensor.
#[derive(Clone, Debug)]
pub struct Check {
    /// Case, tensor, and what computed it.
    pub name: String,
    /// max|a − b| / max|b|; for codes and indices the share that differs. Infinite where something is not finite.
    pub error: f64,
    /// The largest error that passes.
    pub bound: f64,
}

impl Check {
    pub fn passes(&self) -> bool {
        self.error <= self.bound
    }
}

impl std::fmt::Display for Check {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let verdict = if self.passes() { "pass" } else { "FAIL" };
        write!(f, "{:<60} error {:<9.2e} bound {:<8.1e} {verdict}", self.name, self.error, self.bound)
    }
}

/// Runs a case on `device`, and through the f64 reference. An error of the library is a failed check.
pub fn judge(device: &Device, case: &Fixture) -> Result<Vec<Check>> {
    let mut report = Report { case: &case.name, gpu: !device.is_cpu(), checks: Vec::new() };
    let judged = if case.has(&["planes", "x", "phi", "codes"]) {
        hash::judge(device, case, &mut report)
    } else if case.has(&["planes", "q", "sel_union", "out_union"]) {
        socket::judge(device, case, &mut report)
    } else if case.has(&["planes", "q", "est_logits", "bits"]) {
        sign::judge(device, case, &mut report)
    } else if case.has(&["q", "k", "v", "grad_out", "A0", "B0", "out", "AT", "BT", "dq", "dk", "dv"]) {
        race::judge(device, case, &mut report)
    } else if case.has(&["q", "k", "v", "A_prefix", "B_prefix", "out_ratio", "out_bucket_mean"]) {
        race::judge_decoding(device, case, &mut report)
    } else {
        let names: Vec<_> = case.tensors.keys().map(String::as_str).collect();
        unfit(format!("not a known kind of case; its tensors are {}", names.join(", ")))
    };
    match judged {
        Err(Failure::Library(error)) => report.push(&error.to_string(), "device", f64::INFINITY, 0.0),
        other => other?,
    }
    Ok(report.checks)
}

/// Collects the checks of one case.
struct Report<'a> {
    case: &'a str,
    gpu: bool,
    checks: Vec<Check>,
}

impl Report<'_> {
    fn push(&mut self, tensor: &str, by: &str, error: f64, bound: f64) {
        self.checks.push(Check { name: format!("{}: {tensor} ({by})", self.case), error, bound });
    }

    /// Numbers from the device.
    fn device(&mut self, tensor: &str, got: &[f64], want: &[f64], bound: f64) {
        self.push(tensor, "device", relative_error(got, want), bound);
    }

    /// Soft hash or scores from the device, which a GPU's own exp and tanh may make twice as wrong.
    fn device_scores(&mut self, tensor: &str, got: &[f64], want: &[f64]) {
        let bound = if self.gpu { 2e-6 } else { 1e-6 };
        self.device(tensor, got, want, bound);
    }

    /// Codes or index sets from the device.
    fn device_exact(&mut self, tensor: &str, got: &[f64], want: &[f64]) {
        self.push(tensor, "device", share_unequal(got, want), 0.0);
    }

    /// Numbers from the reference: as good as the file stores them.
    fn reference(&mut self, tensor: &str, got: &[f64], want: &Array) {
        let bound = if want.wide { 1e-12 } else { 1.2e-7 };
        self.push(tensor, "reference", relative_error(got, &want.data), bound);
    }

    /// Codes or index sets from the reference.
    fn reference_exact(&mut self, tensor: &str, got: &[f64], want: &[f64]) {
        self.push(tensor, "reference", share_unequal(got, want), 0.0);
    }
}

/// max|a − b| / max|b|; infinite where lengths differ or anything is not finite.
fn relative_error(got: &[f64], want: &[f64]) -> f64 {
    if got.len() != want.len() || got.iter().chain(want).any(|x| !x.is_finite()) {
        return f64::INFINITY;
    }
    let worst = got.iter().zip(want).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    let largest = want.iter().map(|x| x.abs()).fold(0.0, f64::max);
    if worst == 0.0 { 0.0 } else { worst / largest }
}

/// Share of places that differ; 1 where lengths do.
fn share_unequal(got: &[f64], want: &[f64]) -> f64 {
    if got.len() != want.len() {
        return 1.0;
    }
    let unequal = got.iter().zip(want).filter(|(a, b)| a != b).count();
    unequal as f64 / got.len().max(1) as f64
}
