//! The state of sequences: all that decoding needs, whatever the length of the context.

use crate::error::{Error, Result};
use crate::race::config::{RaceConfig, RaceShape};
use crate::race::executor::{StateData, StateStorage};

/// Sizes of a state; states of one shape fit each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct StateShape {
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Ensembles M.
    pub ensembles: usize,
    /// Hash tables L per ensemble.
    pub tables: usize,
    /// Hyperplanes per table P.
    pub planes: usize,
    /// Channels of v.
    pub value_dim: usize,
}

impl StateShape {
    pub(crate) fn new(config: &RaceConfig, shape: &RaceShape) -> Self {
        let RaceConfig { tables, planes, ensembles, .. } = *config;
        Self { num_kv_heads: shape.num_kv_heads, ensembles, tables, planes, value_dim: shape.value_dim }
    }

    /// Buckets S = L·2^P of one ensemble.
    pub fn buckets(&self) -> usize {
        self.tables << self.planes
    }

    /// Elements of A for one sequence.
    pub(crate) fn masses(&self) -> usize {
        self.num_kv_heads * self.ensembles * self.buckets()
    }

    pub(crate) fn check(&self, op: &'static str, tensor: &'static str, other: &Self) -> Result<()> {
        if self == other {
            return Ok(());
        }
        let list = |s: &Self| vec![s.num_kv_heads, s.ensembles, s.tables, s.planes, s.value_dim];
        let expected = format!("[kv heads, ensembles, tables, planes, value_dim] = {:?}", list(self));
        Err(Error::Shape { op, tensor, got: list(other), expected })
    }
}

/// A and B (spec §4) of a batch of sequences, on the device of the [`crate::Race`] that made them.
#[derive(Debug)]
pub struct RaceState {
    pub(crate) storage: StateStorage,
    pub(crate) shape: StateShape,
    pub(crate) tokens: Vec<u64>,
}

impl RaceState {
    /// Sequences.
    pub fn batch(&self) -> usize {
        self.tokens.len()
    }

    /// Tokens that a sequence has taken in; `None` where there is no such sequence.
    pub fn tokens(&self, sequence: usize) -> Option<u64> {
        self.tokens.get(sequence).copied()
    }

    /// Its sizes.
    pub fn shape(&self) -> StateShape {
        self.shape
    }

    /// Bytes held on the device. They do not grow with the context.
    pub fn bytes(&self) -> u64 {
        self.storage.bytes()
    }
}

/// The gradient of a [`RaceState`].
#[derive(Debug)]
pub struct StateGradient {
    pub(crate) storage: StateStorage,
    pub(crate) shape: StateShape,
    pub(crate) batch: usize,
}

impl StateGradient {
    /// Sequences.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Sizes of the state.
    pub fn shape(&self) -> StateShape {
        self.shape
    }
}

/// A state, or the gradient of one, in host memory.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StateParts {
    /// A, `[batch, num_kv_heads, ensembles, buckets]`.
    pub a: Vec<f64>,
    /// B, `[batch, num_kv_heads, ensembles, buckets, value_dim]`.
    pub b: Vec<f64>,
}

impl StateParts {
    /// Checks lengths and values; A must not be negative where it is a state's.
    pub(crate) fn check(&self, op: &'static str, shape: &StateShape, batch: usize, is_state: bool) -> Result<()> {
        let masses = batch.saturating_mul(shape.masses());
        for (tensor, data, expected) in [("a", &self.a, masses), ("b", &self.b, masses.saturating_mul(shape.value_dim))]
        {
            if data.len() != expected {
                let expected = format!("{expected} values for {batch} sequences of {shape:?}");
                return Err(Error::Shape { op, tensor, got: vec![data.len()], expected });
            }
            let wrong =
                |x: &f64| !x.is_finite() || x.abs() > f64::from(f32::MAX) || (tensor == "a" && is_state && *x < 0.0);
            if let Some(i) = data.iter().position(wrong) {
                let inner = shape.buckets() * if tensor == "b" { shape.value_dim } else { 1 };
                let units = shape.num_kv_heads * shape.ensembles;
                let index = [i / inner / units, i / inner % units, i % inner, 0];
                return Err(Error::NonFinite { op, tensor, index });
            }
        }
        Ok(())
    }
}

impl From<StateData> for StateParts {
    fn from(data: StateData) -> Self {
        Self { a: data.a, b: data.b }
    }
}
