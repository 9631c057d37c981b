//! What RACE attention does, chosen by the caller and checked in one place.

use crate::error::{Error, Result};
use crate::lsh::{Hyperplanes, Planes};
use crate::tensor::DType;

/// How a query's bucket sums become an output (spec §4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Normalization {
    /// The paper's Algorithms 1 and 2: (φ(q)·B) / (φ(q)·A), a convex combination of values.
    Ratio,
    /// The published code divided by L: the mean over tables of Σ φ(q)·B / (A + 10⁻⁶), per bucket.
    BucketMean,
    /// The published code as it stands: [`Normalization::BucketMean`] summed over tables instead of averaged.
    BucketSum,
}

impl Normalization {
    /// What [`Normalization::BucketMean`] and [`Normalization::BucketSum`] add to a bucket's mass.
    pub const EPSILON: f64 = 1e-6;

    pub(crate) fn is_ratio(self) -> bool {
        self == Self::Ratio
    }
}

/// Inverse temperature β of the soft hash.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Beta {
    /// One for all heads.
    Shared(f32),
    /// One per kv head, which its query heads share.
    PerHead(Vec<f32>),
}

impl Beta {
    /// The published code's parametrisation, β = 1 / (√`head_dim`·e^`log_temp`).
    pub fn from_log_temp(log_temp: f32, head_dim: usize) -> Self {
        Self::Shared((1.0 / ((head_dim as f64).sqrt() * f64::from(log_temp).exp())) as f32)
    }

    /// The values, one or one per kv head.
    pub fn values(&self) -> &[f32] {
        match self {
            Self::Shared(beta) => std::slice::from_ref(beta),
            Self::PerHead(betas) => betas,
        }
    }

    pub(crate) fn of_head(&self, kv_head: usize) -> f32 {
        match self {
            Self::Shared(beta) => *beta,
            Self::PerHead(betas) => betas.get(kv_head).copied().unwrap_or(f32::NAN),
        }
    }
}

/// Share g of the exact window in an output, `o = g·o_window + (1 − g)·o_race`: 0 is RACE alone, 1 the window alone.
///
/// Values, not logits: they say what is computed, both ends can be reached, and whoever trains logits through a sigmoid
/// multiplies the gradient by g·(1 − g).
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Gate {
    /// One for all heads.
    Shared(f32),
    /// One per query head.
    PerHead(Vec<f32>),
}

impl Default for Gate {
    /// Half of each.
    fn default() -> Self {
        Self::Shared(0.5)
    }
}

impl Gate {
    /// The values, one or one per query head.
    pub fn values(&self) -> &[f32] {
        match self {
            Self::Shared(gate) => std::slice::from_ref(gate),
            Self::PerHead(gates) => gates,
        }
    }

    /// One value per query head.
    pub(crate) fn of_heads(&self, num_q_heads: usize) -> Vec<f32> {
        match self {
            Self::Shared(gate) => vec![*gate; num_q_heads],
            Self::PerHead(gates) => gates.clone(),
        }
    }
}

/// Configuration of [`crate::Race`].
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct RaceConfig {
    /// Hash tables L per ensemble, 1 to 64.
    pub tables: usize,
    /// Hyperplanes P per table, 1 to 8: a table has R = 2^P buckets.
    pub planes: usize,
    /// Independent sets M of `tables` tables whose outputs are averaged, 1 to 64.
    pub ensembles: usize,
    /// Sharpness of the soft hash.
    pub beta: Beta,
    /// How bucket sums become an output.
    pub normalization: Normalization,
    /// Whether a query sees the tokens up to its own only, or all of them.
    pub causal: bool,
    /// Where the hyperplanes come from: `[ensembles · tables, planes, head_dim]`, or that per kv head where supplied.
    pub hyperplanes: Hyperplanes,
    /// Tokens of the exact window beside RACE: a query attends exactly to its own token and to the `window` − 1 before
    /// it, and `gate` mixes both results. 0, the default, is RACE alone; at most 65,536. Causal attention only.
    #[serde(default)]
    pub window: usize,
    /// Share of the window, where there is one.
    #[serde(default)]
    pub gate: Gate,
    /// Scale of the window's logits; 1/√`head_dim` by default.
    #[serde(default)]
    pub window_scale: Option<f32>,
}

impl Default for RaceConfig {
    /// P = L = 4, β = 1, the paper's normalisation, causal, Gaussian planes, no window.
    fn default() -> Self {
        Self {
            tables: 4,
            planes: 4,
            ensembles: 1,
            beta: Beta::Shared(1.0),
            normalization: Normalization::Ratio,
            causal: true,
            hyperplanes: Hyperplanes::Gaussian { seed: 0 },
            window: 0,
            gate: Gate::default(),
            window_scale: None,
        }
    }
}

/// Tokens of a window at most.
const MAX_WINDOW: usize = 1 << 16;

/// Buckets of one ensemble at most.
const MAX_BUCKETS: usize = 4096;

impl RaceConfig {
    /// Buckets S = L·2^P of one ensemble.
    pub fn buckets(&self) -> usize {
        self.tables << self.planes.min(16)
    }

    /// Hyperplanes of all ensembles, M·L·P.
    pub(crate) fn bits(&self) -> usize {
        self.ensembles * self.tables * self.planes
    }

    /// Checks every field against a shape.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field, its value and the rule.
    pub fn validate(&self, shape: &RaceShape) -> Result<()> {
        shape.validate()?;
        for (field, value, limit) in
            [("tables", self.tables, 64), ("planes", self.planes, 8), ("ensembles", self.ensembles, 64)]
        {
            if value == 0 || value > limit {
                return Err(Error::config(field, value, format!("must be 1 to {limit}")));
            }
        }
        if self.buckets() > MAX_BUCKETS {
            return Err(Error::config("tables * 2^planes", self.buckets(), format!("must be at most {MAX_BUCKETS}")));
        }
        check_beta(&self.beta, shape)?;
        self.check_window(shape)
    }

    fn check_window(&self, shape: &RaceShape) -> Result<()> {
        if self.window > MAX_WINDOW {
            return Err(Error::config("window", self.window, format!("must be at most {MAX_WINDOW}")));
        }
        if self.window > 0 && !self.causal {
            let limit = "must be 0 where attention is not causal: the window is that of the last tokens";
            return Err(Error::config("window", self.window, limit));
        }
        if let Some(scale) = self.window_scale
            && !scale.is_finite()
        {
            return Err(Error::config("window_scale", scale, "must be finite"));
        }
        check_gate(&self.gate, shape)
    }
}

pub(crate) fn check_gate(gate: &Gate, shape: &RaceShape) -> Result<()> {
    if let Gate::PerHead(gates) = gate
        && gates.len() != shape.num_q_heads
    {
        let limit = format!("must be num_q_heads = {}", shape.num_q_heads);
        return Err(Error::config("gate (values per head)", gates.len(), limit));
    }
    match gate.values().iter().find(|gate| !(0.0..=1.0).contains(*gate)) {
        Some(bad) => Err(Error::config("gate", bad, "must be 0 to 1")),
        None => Ok(()),
    }
}

fn check_beta(beta: &Beta, shape: &RaceShape) -> Result<()> {
    if let Beta::PerHead(betas) = beta
        && betas.len() != shape.num_kv_heads
    {
        let limit = format!("must be num_kv_heads = {}", shape.num_kv_heads);
        return Err(Error::config("beta (values per head)", betas.len(), limit));
    }
    match beta.values().iter().find(|b| !(b.is_finite() && **b > 0.0)) {
        Some(bad) => Err(Error::config("beta", bad, "must be positive and finite")),
        None => Ok(()),
    }
}

/// Shapes and element type of the tensors; fixed when a [`crate::Race`] is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct RaceShape {
    /// Query heads; a multiple of `num_kv_heads`.
    pub num_q_heads: usize,
    /// Key and value heads, each with one state.
    pub num_kv_heads: usize,
    /// Channels of q and k.
    pub head_dim: usize,
    /// Channels of v and o.
    pub value_dim: usize,
    /// Element type of q, k, v and of gradients of o.
    pub dtype: DType,
}

impl RaceShape {
    /// Query heads that share a kv head.
    pub fn group(&self) -> usize {
        self.num_q_heads / self.num_kv_heads.max(1)
    }

    fn validate(&self) -> Result<()> {
        let Self { num_q_heads, num_kv_heads, head_dim, value_dim, dtype } = *self;
        crate::socket::config::CacheShape { num_q_heads, num_kv_heads, head_dim, value_dim, dtype }.validate()
    }
}

/// What is trained: the hyperplanes and β. Data of the kernels, so a change compiles nothing.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Parameters {
    /// `bits` = M·L·P rows per set.
    pub planes: Planes,
    pub beta: Beta,
}

impl Parameters {
    pub fn new(config: &RaceConfig, shape: &RaceShape) -> Result<Self> {
        let planes = Planes::new(&config.hyperplanes, config.bits(), shape.head_dim, shape.num_kv_heads)?;
        Ok(Self { planes, beta: config.beta.clone() })
    }
}
