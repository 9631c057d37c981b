//! At which lengths sparse attention loses against the fastest exact attention of the run.

use super::figure::{Figure, Report, Table, count};
use super::peers::DEVICE;

/// A line per device, heads and scoring.
pub fn verdicts(report: &Report) -> Vec<String> {
    let mut lines = Vec::new();
    for subject in &report.devices {
        let of_device = |f: &&Figure| f.case.device == subject.asked && f.case.what != "dense";
        let mut kinds: Vec<_> =
            report.of(Table::Decode).filter(of_device).map(|f| (f.case.heads, &f.case.what)).collect();
        kinds.sort_by_key(|&((q, kv), what)| (q, kv, super::decode::ALL.iter().position(|w| w == what)));
        kinds.dedup();
        for (heads, what) in kinds {
            let mine =
                report.of(Table::Decode).filter(of_device).filter(|f| (f.case.heads, &f.case.what) == (heads, what));
            let (mut loses, mut wins, mut last) = (Vec::new(), Vec::new(), None);
            for figure in mine {
                let (Some(seconds), Some(best)) = (figure.seconds(), report.best_dense(&figure.case)) else { continue };
                let Some(dense) = best.seconds() else { continue };
                let by = if best.case.device == DEVICE { &best.case.what } else { &best.case.device };
                let at = count(figure.case.tokens);
                if dense < seconds {
                    loses.push(at.clone())
                } else {
                    wins.push(at.clone())
                }
                last = Some(format!("{:.1}x at {at}, against {by}", dense / seconds));
            }
            let Some(last) = last else { continue };
            let ends = match (loses.is_empty(), wins.is_empty()) {
                (true, _) => "loses at no length".to_string(),
                (_, true) => format!("loses at every length ({})", loses.join(", ")),
                _ => format!("loses at {}, wins at {}", loses.join(", "), wins.join(", ")),
            };
            lines.push(format!("{}, {}/{} heads, {what}: {ends}; {last}.", subject.asked, heads.0, heads.1));
        }
    }
    lines
}
