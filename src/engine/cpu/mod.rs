//! The CPU engine: aligned memory, run-time dispatched SIMD, matrix products, softmax, and work sharing.

pub(crate) mod gemm;
pub(crate) mod memory;
pub(crate) mod simd;
pub(crate) mod softmax;

use rayon::prelude::*;

/// Work, in multiply-adds or elements moved, below which waking other threads costs more than it saves.
const WORTH_SHARING: u64 = 200_000;

/// A product that saturates: amounts of work pass what 32-bit machines count to.
pub(crate) fn product<const N: usize>(factors: [usize; N]) -> u64 {
    factors.iter().fold(1, |product: u64, factor| product.saturating_mul(*factor as u64))
}

/// Runs `f` on every task, on all threads where `work` (multiply-adds or elements moved, all tasks together) is worth
/// it. Results are in the order of the tasks, so what is computed does not depend on the number of threads.
pub(crate) fn map<T: Send, R: Send>(tasks: Vec<T>, work: u64, f: impl Fn(T) -> R + Sync + Send) -> Vec<R> {
    if work < WORTH_SHARING || tasks.len() < 2 {
        tasks.into_iter().map(f).collect()
    } else {
        tasks.into_par_iter().with_max_len(1).map(f).collect()
    }
}
