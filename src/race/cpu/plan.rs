//! Sizes and parameters that all chunks of a call share.

use crate::engine::cpu::memory::{Buffer, zeros};
use crate::engine::cpu::simd::{Level, padded};
use crate::error::Result;
use crate::race::config::{Beta, Parameters, RaceConfig, RaceShape};

/// Sizes of tiles and of states.
#[derive(Clone, Copy, Debug)]
pub(super) struct Plan {
    pub level: Level,
    pub ensembles: usize,
    pub tables: usize,
    /// Hyperplanes of one table.
    pub planes: usize,
    /// Hyperplanes of one ensemble.
    pub bits: usize,
    /// Buckets of one ensemble.
    pub buckets: usize,
    pub kv_heads: usize,
    /// Query heads of a kv head.
    pub group: usize,
    pub dim: usize,
    /// `dim` padded to whole rows of lanes.
    pub dim_row: usize,
    pub value_dim: usize,
    pub value_row: usize,
    /// Tokens of a chunk at most: sums run in f32 over so many, and in f64 beyond. The work inside a chunk grows with
    /// its length, the work at its ends with the buckets.
    pub chunk: usize,
    /// Whether the normalisation is [`crate::Normalization::Ratio`].
    pub ratio: bool,
    /// Weight of one bucket's quotient in a bucket normalisation.
    pub share: f32,
}

impl Plan {
    pub fn new(level: Level, config: &RaceConfig, shape: &RaceShape) -> Self {
        let buckets = config.buckets();
        Self {
            level,
            ensembles: config.ensembles,
            tables: config.tables,
            planes: config.planes,
            bits: config.tables * config.planes,
            buckets,
            kv_heads: shape.num_kv_heads,
            group: shape.group(),
            dim: shape.head_dim,
            dim_row: padded(shape.head_dim),
            value_dim: shape.value_dim,
            value_row: padded(shape.value_dim),
            chunk: if buckets < 16 { 32 } else { 64 },
            ratio: config.normalization.is_ratio(),
            share: match config.normalization {
                crate::Normalization::BucketMean => 1.0 / config.tables as f32,
                _ => 1.0,
            },
        }
    }

    /// Elements of A for one sequence and kv head.
    pub fn masses(&self) -> usize {
        self.ensembles * self.buckets
    }

    /// Elements of B for one sequence and kv head.
    pub fn sums(&self) -> usize {
        self.masses() * self.value_dim
    }

    /// Gradients of hyperplanes for one kv head.
    pub fn weights(&self) -> usize {
        self.ensembles * self.bits * self.dim
    }
}

/// Hyperplanes and β, laid out for the kernels.
pub(super) struct Hashes {
    /// `[sets, ensembles, bits, dim_row]`.
    rows: Buffer,
    beta: Beta,
    one: usize,
    pub sets: usize,
}

impl Hashes {
    pub fn new(plan: &Plan, parameters: &Parameters) -> Result<Self> {
        let planes = &parameters.planes;
        let mut rows = Buffer::zeroed::<f32>("set_parameters", planes.sets * planes.bits * plan.dim_row)?;
        for (to, from) in rows.slice_mut::<f32>().chunks_exact_mut(plan.dim_row).zip(planes.rows.chunks_exact(plan.dim))
        {
            to[..plan.dim].copy_from_slice(from);
        }
        Ok(Self { rows, beta: parameters.beta.clone(), one: planes.bits * plan.dim_row, sets: planes.sets })
    }

    /// That of one kv head.
    pub fn of_head(&self, kv_head: usize) -> Hash<'_> {
        let set = if self.sets == 1 { 0 } else { kv_head };
        let rows = &self.rows.slice()[set * self.one..(set + 1) * self.one];
        Hash { rows, beta: self.beta.of_head(kv_head) }
    }

    /// Number of β's.
    pub fn betas(&self) -> usize {
        self.beta.values().len()
    }
}

/// The hash of one kv head.
#[derive(Clone, Copy)]
pub(super) struct Hash<'a> {
    /// `[ensembles, bits, dim_row]`.
    pub rows: &'a [f32],
    pub beta: f32,
}

impl<'a> Hash<'a> {
    /// Hyperplanes of one ensemble, `[bits, dim_row]`.
    pub fn ensemble(&self, plan: &Plan, m: usize) -> &'a [f32] {
        let one = plan.bits * plan.dim_row;
        &self.rows[m * one..(m + 1) * one]
    }
}

/// A copy, refused where there is no memory for it.
pub(super) fn copied(op: &'static str, from: &[f64]) -> Result<Vec<f64>> {
    let mut to = zeros(op, from.len())?;
    to.copy_from_slice(from);
    Ok(to)
}
