//! The formulas of RACE in f64, for reading and for tests. Nothing here is optimised.
//!
//! Everything is one head and one ensemble: a query, key or value is a list of rows, `[tokens, channels]` row-major. A
//! token is hashed ([`features`]) into S = L·2^P bucket weights φ; a [`State`] sums φ(k) and φ(k) ⊗ v; a query reads
//! it with its own φ. Several heads share planes and β by the caller's doing; a group of query heads shares the state
//! of its kv head, so their gradients of it add.
//!
//! [`forward`] and [`backward`] follow the definitions token by token; [`window_forward`] and [`mix`] are the exact window
//! beside them.

mod backward;
mod forward;
mod hash;
mod window;

pub use backward::{Gradients, backward};
pub use forward::{State, forward};
pub use hash::{HashGradient, features, features_backward};
pub use window::{Window, WindowGradients, mix, mix_backward, window_backward, window_forward};

use crate::race::config::Normalization;

/// One kv head with its query heads.
#[derive(Clone, Debug)]
pub struct Problem<'a> {
    /// Hash tables L.
    pub tables: usize,
    /// Hyperplanes per table P.
    pub planes_per_table: usize,
    /// `[tables * planes_per_table, head_dim]`.
    pub planes: &'a [f64],
    /// Inverse temperature.
    pub beta: f64,
    /// How bucket sums become an output.
    pub normalization: Normalization,
    /// What the bucket normalisations add to a mass; [`Normalization::EPSILON`] is what the library adds.
    pub epsilon: f64,
    /// Whether token i reads tokens 0 to i, or all.
    pub causal: bool,
    /// Channels of q and k.
    pub head_dim: usize,
    /// Channels of v.
    pub value_dim: usize,
    /// Queries of each query head, `[tokens, head_dim]`.
    pub q: Vec<&'a [f64]>,
    /// `[tokens, head_dim]`.
    pub k: &'a [f64],
    /// `[tokens, value_dim]`.
    pub v: &'a [f64],
}

impl Problem<'_> {
    /// Buckets S.
    pub fn buckets(&self) -> usize {
        self.tables << self.planes_per_table
    }

    /// Tokens.
    pub fn tokens(&self) -> usize {
        self.k.len() / self.head_dim
    }

    /// Weight of one bucket's quotient in a bucket normalisation.
    fn share(&self) -> f64 {
        match self.normalization {
            Normalization::BucketMean => 1.0 / self.tables as f64,
            _ => 1.0,
        }
    }

    fn features(&self, x: &[f64]) -> Vec<Vec<f64>> {
        x.chunks_exact(self.head_dim).map(|x| features(self.planes, self.planes_per_table, self.beta, x)).collect()
    }
}
