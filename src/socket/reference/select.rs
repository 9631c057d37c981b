//! Which keys are attended.

use crate::socket::config::{Rule, SocketConfig};

/// Keys to choose by score among `n` visible ones: the budget's fixed number, or ⌈n·ratio⌉ less sink and window.
pub fn heavy(config: &SocketConfig, n: usize) -> usize {
    config.heavy(n)
}

/// Mean over the query heads of a group: `scores` is `[group][keys]`, the result `[keys]`.
pub fn group_mean(scores: &[Vec<f64>]) -> Vec<f64> {
    let keys = scores.first().map_or(0, Vec::len);
    (0..keys).map(|j| scores.iter().map(|s| s[j]).sum::<f64>() / scores.len() as f64).collect()
}

/// Indices of the attended keys, ascending, each once, given the score of every visible key.
///
/// The first `sink` and the last `window` keys are always there. [`Rule::Disjoint`] adds the `heavy` best of all
/// others, [`Rule::Union`] the `heavy` best of all keys. Ties go to the lower index. Where `sink + window + heavy`
/// keys or fewer are visible, all are selected.
pub fn select(scores: &[f64], rule: Rule, sink: usize, window: usize, heavy: usize) -> Vec<usize> {
    let n = scores.len();
    if n <= sink.saturating_add(window).saturating_add(heavy) {
        return (0..n).collect();
    }
    let always = |j: usize| j < sink || j >= n - window;
    let mut candidates: Vec<usize> = (0..n).filter(|&j| rule == Rule::Union || !always(j)).collect();
    // A stable sort keeps the lower index first among equals.
    candidates.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
    let mut selected: Vec<usize> = (0..n).filter(|&j| always(j)).collect();
    selected.extend(candidates.into_iter().take(heavy));
    selected.sort_unstable();
    selected.dedup();
    selected
}
