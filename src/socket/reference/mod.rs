//! The formulas of SOCKET in f64, stage by stage, for reading and for tests. Nothing here is optimised.
//!
//! Everything is a plain function over row-major slices. One head's keys or values are a list of rows; a query is one
//! row. Words: `bits` = tables · planes hyperplanes per head, `bits / planes` tables, `2^planes` buckets per table;
//! plane 0 is the most significant bit of a code, and bit 1 means a projection ≥ 0.
//!
//! Stages: [`project`] → [`codes`] or [`soft_hash`] → a score per key → [`select`] → [`attend`]. [`decode`] composes
//! them for one sequence under any [`crate::SocketConfig`].
//!
//! Slices must have the lengths that each function states; [`decode`] alone checks them.

mod attend;
mod decode;
mod hash;
mod score;
mod select;
mod tail;

pub use attend::{attend, causal, merge};
pub use decode::{Decoded, Problem, Row, decode};
pub use hash::{codes, mean_of_first, normalized, project, soft_hash, soft_hash_by_corners};
pub use score::{hamming, hard_collision, norm, sign_gain, sign_projection, soft_collision};
pub use select::{group_mean, heavy, select};
pub use tail::{attend_with_tail, sign_variance};

/// The rows of head `head` in a `[tokens, heads, dim]` tensor.
pub fn head_rows(data: &[f64], heads: usize, dim: usize, head: usize) -> Vec<&[f64]> {
    data.chunks_exact(heads * dim).map(|token| &token[head * dim..(head + 1) * dim]).collect()
}

/// `a · b`.
pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
