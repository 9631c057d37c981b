//! One look for every progress bar. Bars go to standard error and vanish where that is no terminal.

use indicatif::{ProgressBar, ProgressStyle};

/// A bar over `steps` steps.
pub fn bar(steps: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg:34} [{bar:40}] {percent:>3}%  {elapsed} (left {eta})");
    ProgressBar::new(steps).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()).progress_chars("=> "))
}
