//! What SOCKET does, chosen by the caller and checked in one place.

use crate::error::{Error, Result};
use crate::lsh::{BitLayout, Hyperplanes, MAX_PLANES, MAX_TABLES};
use crate::tensor::DType;

/// Sharpness of the soft hash. Both forms name the same number, β = 1 / (τ·√`head_dim`).
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Temperature {
    /// Inverse temperature, the canonical parameter.
    Beta(f32),
    /// The SOCKET paper's temperature.
    Tau(f32),
}

impl Temperature {
    /// β for a head dimension.
    pub fn beta(self, head_dim: usize) -> f32 {
        match self {
            Self::Beta(beta) => beta,
            Self::Tau(tau) => (1.0 / (f64::from(tau) * (head_dim as f64).sqrt())) as f32,
        }
    }
}

/// How many keys beside sink and window are attended.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub enum Budget {
    /// A fixed number of keys, not counting sink and window.
    Tokens(usize),
    /// A share of the keys, counting sink and window: ⌈n·ratio⌉.
    Ratio(f32),
}

/// Which keys compete for the budget.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Rule {
    /// Top keys among those outside sink and window: the number selected is fixed.
    Disjoint,
    /// The authors' rule: top keys among all, united with sink and window.
    Union,
}

/// Whose selection it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum SelectionScope {
    /// One selection per query head.
    PerHead,
    /// One for all query heads of a kv head, from the mean of their scores.
    PerGroup,
}

/// How a query scores the keys (spec §3).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub enum Scoring {
    /// SOCKET, arXiv 2602.06283: the sum over tables of the query's soft-hash weight of the key's bucket.
    SoftCollision,
    /// A linear one-bit estimate of the logit itself (QJL, RaBitQ).
    SignProjection,
    /// The number of tables in which query and key share a bucket.
    HardCollision,
    /// The number of equal sign bits.
    Hamming,
}

impl Scoring {
    /// Whether the digits of a code combine by product (else by sum).
    pub(crate) fn multiplies(self) -> bool {
        matches!(self, Self::SoftCollision | Self::HardCollision)
    }
}

/// Configuration of a [`crate::SocketCache`].
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct SocketConfig {
    /// Hash tables, 1 to 1024.
    pub tables: usize,
    /// Hyperplanes per table, 1 to 16.
    pub planes: usize,
    /// Sharpness of the soft hash; [`Scoring::SoftCollision`] alone reads it.
    pub temperature: Temperature,
    /// Keys attended beside sink and window.
    pub budget: Budget,
    /// Which keys compete for the budget.
    pub rule: Rule,
    /// First tokens, always attended.
    pub sink: usize,
    /// Last tokens, always attended.
    pub window: usize,
    /// Weight scores by ‖v‖ (multiplied; for [`Scoring::SignProjection`], which estimates a logit, ln ‖v‖ is added).
    pub value_norm: bool,
    /// Whose selection it is.
    pub scope: SelectionScope,
    /// How keys are scored.
    pub scoring: Scoring,
    /// Where the hyperplanes come from.
    pub hyperplanes: Hyperplanes,
    /// Divide the query by its norm before hashing; the temperature then is the normalised query's own.
    pub normalize_query: bool,
    /// Hash keys less the mean of the first `C` keys of each kv head, frozen once `C` keys are there. A shorter
    /// sequence is attended densely.
    pub center: Option<usize>,
}

impl SocketConfig {
    /// SOCKET as published: L = 60, P = 8, τ = 0.3, Gaussian planes, ‖v‖ weight, union rule, budget 1/33.
    pub fn paper() -> Self {
        Self {
            tables: 60,
            planes: 8,
            temperature: Temperature::Tau(0.3),
            budget: Budget::Ratio(1.0 / 33.0),
            rule: Rule::Union,
            sink: 128,
            window: 128,
            value_norm: true,
            scope: SelectionScope::PerHead,
            scoring: Scoring::SoftCollision,
            hyperplanes: Hyperplanes::Gaussian { seed: 0 },
            normalize_query: false,
            center: None,
        }
    }

    /// Sign projection with 128 Hadamard bits, centred on the first 1024 keys, disjoint rule, budget 1/33.
    pub fn fast() -> Self {
        Self {
            tables: 16,
            rule: Rule::Disjoint,
            value_norm: false,
            scoring: Scoring::SignProjection,
            hyperplanes: Hyperplanes::Hadamard { seed: 0 },
            center: Some(1024),
            ..Self::paper()
        }
    }

    /// As [`SocketConfig::fast`] with another number of bits, a multiple of 8.
    pub fn sign_projection(bits: usize) -> Self {
        // A number of bits that is no multiple of 8 becomes a table count of zero, which `validate` refuses.
        Self { tables: if bits.is_multiple_of(8) { bits / 8 } else { 0 }, ..Self::fast() }
    }

    pub(crate) fn layout(&self) -> BitLayout {
        BitLayout { tables: self.tables, planes: self.planes }
    }

    /// Per-key scalars stored beside the sign bits.
    pub(crate) fn scalars(&self) -> KeyScalars {
        let sign = self.scoring == Scoring::SignProjection;
        KeyScalars { gain: sign || self.value_norm, bias: sign && self.value_norm }
    }

    /// Keys chosen by score when `n` keys are visible.
    pub(crate) fn heavy(&self, n: usize) -> usize {
        match self.budget {
            Budget::Tokens(m) => m,
            // The ratio is an f32: a rounding of it upwards must not add a key, so that 1/33 of 33 is 1.
            Budget::Ratio(r) => {
                let total = (n as f64 * f64::from(r) * (1.0 - f64::from(f32::EPSILON))).ceil() as usize;
                total.min(n).saturating_sub(self.sink + self.window)
            }
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field, its value and the rule.
    pub fn validate(&self) -> Result<()> {
        let range = |field, value: usize, lo: usize, hi: usize| {
            if (lo..=hi).contains(&value) {
                Ok(())
            } else {
                Err(Error::config(field, value, format!("must be {lo} to {hi}")))
            }
        };
        range("tables", self.tables, 1, MAX_TABLES)?;
        range("planes", self.planes, 1, MAX_PLANES)?;
        range("tables * planes", self.tables * self.planes, 1, 8192)?;
        range("sink", self.sink, 0, 1 << 30)?;
        range("window", self.window, 0, 1 << 30)?;
        let (field, value) = match self.temperature {
            Temperature::Beta(x) => ("temperature (beta)", x),
            Temperature::Tau(x) => ("temperature (tau)", x),
        };
        if !(value.is_finite() && value > 0.0) {
            return Err(Error::config(field, value, "must be positive and finite"));
        }
        if let Budget::Ratio(r) = self.budget
            && !(r > 0.0 && r <= 1.0)
        {
            return Err(Error::config("budget (ratio)", r, "must be above 0 and at most 1"));
        }
        if let Budget::Tokens(m) = self.budget {
            range("budget (tokens)", m, 0, 1 << 30)?;
            if m + self.sink + self.window == 0 {
                return Err(Error::config(
                    "budget (tokens)",
                    0,
                    "must be above 0 where sink and window are 0: nothing would be attended",
                ));
            }
        }
        if let Some(c) = self.center {
            range("center", c, 1, 1 << 20)?;
        }
        Ok(())
    }
}

/// Which scalars a key stores for scoring: score = gain·Σ + bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct KeyScalars {
    pub gain: bool,
    pub bias: bool,
}

/// Shapes and element type of a cache; fixed when it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct CacheShape {
    /// Query heads; a multiple of `num_kv_heads`.
    pub num_q_heads: usize,
    /// Key and value heads.
    pub num_kv_heads: usize,
    /// Channels of q and k.
    pub head_dim: usize,
    /// Channels of v and o.
    pub value_dim: usize,
    /// Element type of k and v, kept as given.
    pub dtype: DType,
}

impl CacheShape {
    /// Query heads that share a kv head.
    pub fn group(&self) -> usize {
        self.num_q_heads / self.num_kv_heads.max(1)
    }

    /// Checks every field.
    ///
    /// # Errors
    /// [`Error::Config`] naming the field, its value and the rule.
    pub fn validate(&self) -> Result<()> {
        for (field, value, limit) in [
            ("num_q_heads", self.num_q_heads, 1024),
            ("num_kv_heads", self.num_kv_heads, 1024),
            ("head_dim", self.head_dim, 512),
            ("value_dim", self.value_dim, 512),
        ] {
            if value == 0 || value > limit {
                return Err(Error::config(field, value, format!("must be 1 to {limit}")));
            }
        }
        if !self.num_q_heads.is_multiple_of(self.num_kv_heads) {
            let limit = format!("must be a multiple of num_kv_heads = {}", self.num_kv_heads);
            return Err(Error::config("num_q_heads", self.num_q_heads, limit));
        }
        if !self.dtype.is_float() {
            return Err(Error::config("dtype", format!("{:?}", self.dtype), "must be F32, F16 or Bf16"));
        }
        Ok(())
    }
}
