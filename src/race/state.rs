//! The state of sequences: all that decoding needs, whatever the length of the context.

use crate::error::{Error, Result};
use crate::race::config::{RaceConfig, RaceShape};
use crate::race::executor::{StateData, StateStorage};
use crate::race::window::{Ring, RingData};
use crate::tensor::DType;

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
    /// What is kept of the last tokens, where there is an exact window.
    #[serde(default)]
    pub window: Option<WindowShape>,
}

/// The keys and values that a state keeps for the exact window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct WindowShape {
    /// Tokens of the window.
    pub tokens: usize,
    /// Channels of k.
    pub head_dim: usize,
    /// Element type of k and v.
    pub dtype: DType,
}

impl StateShape {
    pub(crate) fn new(config: &RaceConfig, shape: &RaceShape) -> Self {
        let RaceConfig { tables, planes, ensembles, .. } = *config;
        let RaceShape { num_kv_heads, head_dim, value_dim, dtype, .. } = *shape;
        let window = (config.window > 0).then_some(WindowShape { tokens: config.window, head_dim, dtype });
        Self { num_kv_heads, ensembles, tables, planes, value_dim, window }
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
        if self.window != other.window {
            let in_words = |s: &Self| match s.window {
                None => "no window".into(),
                Some(w) => format!("a window of {} tokens, {} channels of k, {:?}", w.tokens, w.head_dim, w.dtype),
            };
            let expected = format!("{expected} and {}, got {}", in_words(self), in_words(other));
            return Err(Error::Shape { op, tensor, got: list(other), expected });
        }
        Err(Error::Shape { op, tensor, got: list(other), expected })
    }
}

/// A and B (spec §4) of a batch of sequences, and the last keys and values where there is a window, on the device of the [`crate::Race`] that made them.
#[derive(Debug)]
pub struct RaceState {
    pub(crate) storage: StateStorage,
    pub(crate) ring: Option<Ring>,
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
        self.storage.bytes() + self.ring.as_ref().map_or(0, Ring::bytes)
    }
}

/// The gradient of a [`RaceState`].
#[derive(Debug)]
pub struct StateGradient {
    pub(crate) storage: StateStorage,
    pub(crate) ring: Option<Ring>,
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
    /// The last keys where there is an exact window, else empty: `[batch, window, num_kv_heads, head_dim]`. The token at
    /// position p of its sequence stands in slot p modulo the window; slots that no token has reached are zero.
    pub window_k: Vec<f32>,
    /// Their values, `[batch, window, num_kv_heads, value_dim]`.
    pub window_v: Vec<f32>,
}

impl StateParts {
    pub(crate) fn new(data: StateData, ring: Option<RingData>) -> Self {
        let RingData { k, v } = ring.unwrap_or_default();
        Self { a: data.a, b: data.b, window_k: k, window_v: v }
    }

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
        let slots = batch.saturating_mul(shape.window.map_or(0, |w| w.tokens));
        let head_dim = shape.window.map_or(0, |w| w.head_dim);
        for (tensor, data, dim) in
            [("window_k", &self.window_k, head_dim), ("window_v", &self.window_v, shape.value_dim)]
        {
            let expected = slots.saturating_mul(shape.num_kv_heads).saturating_mul(dim);
            if data.len() != expected {
                let expected = format!("{expected} values for {batch} sequences of {shape:?}");
                return Err(Error::Shape { op, tensor, got: vec![data.len()], expected });
            }
            if let Some(i) = data.iter().position(|x| !x.is_finite()) {
                let (heads, slots) = (shape.num_kv_heads, slots / batch.max(1));
                let index = [i / dim / heads / slots, i / dim / heads % slots, i / dim % heads, i % dim];
                return Err(Error::NonFinite { op, tensor, index });
            }
        }
        Ok(())
    }
}
