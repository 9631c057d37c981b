//! Hyperplanes and the packing of sign bits: the one definition of seeds, bit order and word layout.

use crate::error::{Error, Result};
use rand_chacha::{ChaCha8Rng, rand_core::SeedableRng};
use rand_distr::{Distribution, StandardNormal};
use std::sync::Arc;

/// Planes per table at most: a code must fit 16 bits.
pub const MAX_PLANES: usize = 16;
/// Tables at most.
pub const MAX_TABLES: usize = 1024;

/// Where the hyperplanes come from. Seeded ones are drawn from ChaCha8 (`seed_from_u64`), so a seed means the same
/// planes on every platform and device.
#[derive(Clone, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
#[non_exhaustive]
pub enum Hyperplanes {
    /// Independent standard normal rows (both papers).
    Gaussian {
        /// Seed of the stream.
        seed: u64,
    },
    /// Gaussian rows, orthogonalised in blocks of `head_dim` and rescaled to norm √`head_dim`.
    Orthogonal {
        /// Seed of the stream.
        seed: u64,
    },
    /// Rows of two rounds of random signs and a Walsh-Hadamard transform, padded to a power of two.
    Hadamard {
        /// Seed of the stream.
        seed: u64,
    },
    /// The caller's own: `[tables, planes, head_dim]`, or `[num_kv_heads, tables, planes, head_dim]`.
    Supplied(Arc<[f32]>),
}

impl Hyperplanes {
    /// The hyperplanes as rows: `[tables * planes, head_dim]`, or `[num_kv_heads, tables * planes, head_dim]` where
    /// supplied per kv head. What a cache of these sizes hashes with (for [`Hyperplanes::Hadamard`] up to the rounding
    /// of its fast transform).
    ///
    /// # Errors
    /// [`Error::Config`] for a size of zero or above its limit, and for supplied values that are not finite or do not
    /// fit.
    pub fn rows(&self, tables: usize, planes: usize, head_dim: usize, num_kv_heads: usize) -> Result<Vec<f32>> {
        for (field, value, limit) in [
            ("tables", tables, MAX_TABLES),
            ("planes", planes, MAX_PLANES),
            ("head_dim", head_dim, 512),
            ("num_kv_heads", num_kv_heads, 1024),
        ] {
            if value == 0 || value > limit {
                return Err(Error::config(field, value, format!("must be 1 to {limit}")));
            }
        }
        Ok(Planes::new(self, tables * planes, head_dim, num_kv_heads)?.rows)
    }
}

/// The random signs of one Hadamard block: `first` is applied before the first transform, `second` before the second.
#[derive(Clone, Debug)]
pub(crate) struct HadamardBlock {
    pub first: Vec<f32>,
    pub second: Vec<f32>,
}

/// Hyperplanes made for one shape.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Planes {
    /// `[sets, tables * planes, head_dim]`.
    pub rows: Vec<f32>,
    /// 1, or one set per kv head.
    pub sets: usize,
    pub bits: usize,
    pub head_dim: usize,
}

impl Planes {
    pub fn new(source: &Hyperplanes, bits: usize, head_dim: usize, num_kv_heads: usize) -> Result<Self> {
        let make = |rows, sets| Self { rows, sets, bits, head_dim };
        Ok(match source {
            Hyperplanes::Gaussian { seed } => make(gaussian(*seed, bits * head_dim), 1),
            Hyperplanes::Orthogonal { seed } => make(orthogonal(*seed, bits, head_dim), 1),
            Hyperplanes::Hadamard { seed } => {
                let blocks = hadamard_blocks(*seed, bits, head_dim);
                make(hadamard_rows(&blocks, bits, head_dim), 1)
            }
            Hyperplanes::Supplied(rows) => {
                let one = bits * head_dim;
                let sets = match rows.len() {
                    n if n == one => 1,
                    n if n == one * num_kv_heads => num_kv_heads,
                    n => {
                        let limit = format!("must hold {one} values, or {one} for each of {num_kv_heads} kv heads");
                        return Err(Error::config("hyperplanes", format!("Supplied of {n} values"), limit));
                    }
                };
                if let Some(i) = rows.iter().position(|x| !x.is_finite()) {
                    return Err(Error::config("hyperplanes", rows[i], format!("value {i} must be finite")));
                }
                make(rows.to_vec(), sets)
            }
        })
    }

    /// Rows `[bits, head_dim]` of a kv head.
    pub fn of_head(&self, kv_head: usize) -> &[f32] {
        let one = self.bits * self.head_dim;
        let set = if self.sets == 1 { 0 } else { kv_head };
        &self.rows[set * one..(set + 1) * one]
    }
}

fn gaussian(seed: u64, n: usize) -> Vec<f32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| StandardNormal.sample(&mut rng)).collect()
}

fn orthogonal(seed: u64, bits: usize, dim: usize) -> Vec<f32> {
    let mut rows: Vec<f64> = gaussian(seed, bits * dim).into_iter().map(f64::from).collect();
    for block in rows.chunks_mut(dim * dim) {
        for i in 0..block.len() / dim {
            let (done, rest) = block.split_at_mut(i * dim);
            let row = &mut rest[..dim];
            // Twice: the second pass removes what rounding left of the first.
            for _ in 0..2 {
                for other in done.chunks(dim) {
                    let dot: f64 = row.iter().zip(other).map(|(a, b)| a * b).sum::<f64>() / dim as f64;
                    row.iter_mut().zip(other).for_each(|(a, b)| *a -= dot * b);
                }
            }
            let norm = row.iter().map(|x| x * x).sum::<f64>().sqrt();
            row.iter_mut().for_each(|x| *x *= (dim as f64).sqrt() / norm);
        }
    }
    rows.into_iter().map(|x| x as f32).collect()
}

fn hadamard_blocks(seed: u64, bits: usize, dim: usize) -> Vec<HadamardBlock> {
    let padded = dim.next_power_of_two();
    let signs: Vec<f32> = gaussian(seed, bits.div_ceil(padded) * 2 * padded).iter().map(|x| x.signum()).collect();
    signs
        .chunks(2 * padded)
        .map(|c| HadamardBlock { first: c[..padded].to_vec(), second: c[padded..].to_vec() })
        .collect()
}

/// In-place unnormalised Walsh-Hadamard transform of a power-of-two length.
pub(crate) fn walsh_hadamard(x: &mut [f32]) {
    let mut half = 1;
    while half < x.len() {
        for pair in x.chunks_mut(2 * half) {
            let (a, b) = pair.split_at_mut(half);
            for (a, b) in a.iter_mut().zip(b) {
                (*a, *b) = (*a + *b, *a - *b);
            }
        }
        half *= 2;
    }
}

impl HadamardBlock {
    /// Projects `x` (padded with zeros, overwritten by the projections on this block's rows).
    pub fn apply(&self, x: &mut [f32]) {
        x.iter_mut().zip(&self.first).for_each(|(x, s)| *x *= s);
        walsh_hadamard(x);
        // Two unnormalised transforms of length n scale by n; rows of norm √n need √n less.
        let scale = 1.0 / (x.len() as f32).sqrt();
        x.iter_mut().zip(&self.second).for_each(|(x, s)| *x *= s * scale);
        walsh_hadamard(x);
    }
}

fn hadamard_rows(blocks: &[HadamardBlock], bits: usize, dim: usize) -> Vec<f32> {
    let padded = dim.next_power_of_two();
    let mut rows = vec![0.0; bits * dim];
    for d in 0..dim {
        for (b, block) in blocks.iter().enumerate() {
            let mut unit = vec![0.0; padded];
            unit[d] = 1.0;
            block.apply(&mut unit);
            for (i, x) in unit.iter().enumerate().take(bits.saturating_sub(b * padded)) {
                rows[(b * padded + i) * dim + d] = *x;
            }
        }
    }
    rows
}

/// How a key's sign bits lie in 32-bit words: whole codes, lowest table first from the least significant bit;
/// inside a code plane 0 is the most significant bit. Scorers read a code in digits of four bits, lowest first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct BitLayout {
    pub tables: usize,
    pub planes: usize,
}

impl BitLayout {
    /// Entries of one digit's look-up table.
    pub const DIGIT: usize = 16;

    pub fn tables_per_word(self) -> usize {
        32 / self.planes
    }

    /// Words of one key.
    pub fn words(self) -> usize {
        self.tables.div_ceil(self.tables_per_word())
    }

    pub fn bits(self) -> usize {
        self.tables * self.planes
    }

    /// Four-bit digits of one code.
    pub fn digits(self) -> usize {
        self.planes.div_ceil(4)
    }

    /// f32 entries of one query's look-up tables, `[tables, digits, 16]`.
    pub fn entries(self) -> usize {
        self.tables * self.digits() * Self::DIGIT
    }

    /// Word and bit of plane `p` of table `l`.
    pub fn position(self, l: usize, p: usize) -> (usize, usize) {
        (l / self.tables_per_word(), l % self.tables_per_word() * self.planes + self.planes - 1 - p)
    }

    /// Code of table `l` out of a key's word `l / tables_per_word`.
    #[cfg(test)]
    pub fn code(self, word: u32, l: usize) -> u32 {
        let shift = l % self.tables_per_word() * self.planes;
        (word >> shift) & ((1u32 << self.planes) - 1)
    }
}
