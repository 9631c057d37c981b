//! Sizes and decisions of SOCKET decoding: pure arithmetic, no device words.

use crate::socket::problem::CacheSpec;

/// Whether [`crate::Mode::Auto`] runs the sparse path at this length. The lengths come from the table in
/// `benches/NOTES.md`: the shortest measured at which sparse won.
pub(crate) fn prefers_sparse(spec: &CacheSpec, cpu: bool, len: usize) -> bool {
    let cheap_scan = spec.config.layout().bits() <= 128;
    let crossover = match (cpu, cheap_scan) {
        (true, true) => 8 << 10,
        (true, false) => 16 << 10,
        (false, true) => 32 << 10,
        (false, false) => 128 << 10,
    };
    len >= crossover
}
