//! Saved states: one safetensors file, which any device can load.
//!
//! | tensor | shape | dtype |
//! |---|---|---|
//! | `planes` | sets, ensembles · tables · planes, `head_dim` | F32 |
//! | `beta` | 1, or `num_kv_heads` | F32 |
//! | `a` | batch, `num_kv_heads`, ensembles, buckets | F64 |
//! | `b` | batch, `num_kv_heads`, ensembles, buckets, `value_dim` | F64 |
//! | `window_k` | batch, window, `num_kv_heads`, `head_dim`; where there is an exact window | that of k and v |
//! | `window_v` | batch, window, `num_kv_heads`, `value_dim`; likewise | that of k and v |
//!
//! A state means nothing without the hyperplanes and β that it was summed under, so both are kept, and a state is
//! loaded only where they are in use.

use crate::error::{Error, Result};
use crate::file::{Format, SavedFile, bad_file, f32_bytes, floats, load, save, seal};
use crate::race::attention::Race;
use crate::race::config::Beta;
use crate::race::state::{RaceState, StateParts, StateShape, WindowShape};
use crate::tensor::DType;
use crate::tensor::convert::encode;
use half::{bf16, f16};
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

const FORMAT: Format = Format { entry: "softhash.race_state", what: "RACE state", version: 1 };
const MAX_BATCH: usize = 65536;

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    shape: StateShape,
    head_dim: usize,
    /// Tokens that each sequence has taken in.
    tokens: Vec<u64>,
}

fn file_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::BF16,
        _ => Dtype::F32,
    }
}

/// Shape of `window_k` or `window_v`.
fn ring_shape(shape: &StateShape, window: &WindowShape, name: &str, batch: usize) -> [usize; 4] {
    let dim = if name == "window_k" { window.head_dim } else { shape.value_dim };
    [batch, window.tokens, shape.num_kv_heads, dim]
}

impl Race {
    /// A state as the bytes of a safetensors file with a format version and a checksum. Any device can load it.
    ///
    /// # Errors
    /// As [`Race::read_state`]; [`Error::File`].
    pub fn state_to_bytes(&self, state: &RaceState) -> Result<Vec<u8>> {
        let StateParts { a, b, window_k, window_v } = self.read_state(state)?;
        let shape = state.shape;
        let wide = |x: Vec<f64>| x.into_iter().flat_map(f64::to_le_bytes).collect::<Vec<_>>();
        let rows = self.hyperplanes()?;
        let (bits, dim) = (self.config().bits(), self.shape().head_dim);
        let masses = vec![state.batch(), shape.num_kv_heads, shape.ensembles, shape.buckets()];
        let sums = masses.iter().copied().chain([shape.value_dim]).collect();
        let beta = self.config().beta.values();
        let mut tensors = BTreeMap::from([
            ("planes".into(), (Dtype::F32, vec![rows.len() / (bits * dim), bits, dim], f32_bytes(&rows))),
            ("beta".into(), (Dtype::F32, vec![beta.len()], f32_bytes(beta))),
            ("a".into(), (Dtype::F64, masses, wide(a))),
            ("b".into(), (Dtype::F64, sums, wide(b))),
        ]);
        if let Some(window) = shape.window {
            for (name, x) in [("window_k", window_k), ("window_v", window_v)] {
                let shape = ring_shape(&shape, &window, name, state.batch()).to_vec();
                tensors.insert(name.into(), (file_dtype(window.dtype), shape, encode(window.dtype, &x)));
            }
        }
        seal(FORMAT, &Header { version: FORMAT.version, shape, head_dim: dim, tokens: state.tokens.clone() }, tensors)
    }

    /// Writes [`Race::state_to_bytes`] to a file, which appears whole or not at all.
    ///
    /// # Errors
    /// As [`Race::state_to_bytes`]; [`Error::File`] where the file cannot be written.
    pub fn save_state_to(&self, state: &RaceState, path: impl AsRef<Path>) -> Result<()> {
        save(path.as_ref(), &self.state_to_bytes(state)?)
    }

    /// A state from the bytes that [`Race::state_to_bytes`] made, whichever device made them. The bytes may come from
    /// anywhere: sizes, values and checksum are checked.
    ///
    /// # Errors
    /// [`Error::File`] naming what is wrong with the file, or that it was saved under another shape, other hyperplanes
    /// or another β; the errors of [`Race::write_state`].
    pub fn state_from_bytes(&self, bytes: &[u8]) -> Result<RaceState> {
        let file = SavedFile::open(FORMAT, bytes)?;
        let Header { shape, head_dim, tokens, .. } = file.header()?;
        let (bits, dim) = (self.config().bits(), self.shape().head_dim);
        if (shape, head_dim) != (self.state_shape(), dim) {
            let ours = self.state_shape();
            return Err(bad_file(format!("saved under {shape:?}, head_dim {head_dim}; in use are {ours:?}, {dim}")));
        }
        if tokens.len() > MAX_BATCH {
            return Err(bad_file(format!("{} sequences, the limit is {MAX_BATCH}", tokens.len())));
        }
        file.check_count(if shape.window.is_some() { 6 } else { 4 })?;
        let rows = self.hyperplanes()?;
        let beta: &Beta = &self.config().beta;
        let same = |name: &str, shape: &[usize], ours: &[f32]| -> Result<()> {
            if file.tensor(name, Dtype::F32, shape)? == f32_bytes(ours) {
                return Ok(());
            }
            Err(bad_file(format!("saved under another {name} than the one in use")))
        };
        same("planes", &[rows.len() / (bits * dim), bits, dim], &rows)?;
        same("beta", &[beta.values().len()], beta.values())?;
        let masses = [tokens.len(), shape.num_kv_heads, shape.ensembles, shape.buckets()];
        let sums = [&masses[..], &[shape.value_dim]].concat();
        let wide = |name: &str, shape: &[usize]| -> Result<Vec<f64>> {
            let bytes = file.tensor(name, Dtype::F64, shape)?;
            Ok(bytes.as_chunks::<8>().0.iter().map(|b| f64::from_le_bytes(*b)).collect())
        };
        let ring = |name: &str| -> Result<Vec<f32>> {
            let Some(window) = shape.window else { return Ok(Vec::new()) };
            let bytes =
                file.tensor(name, file_dtype(window.dtype), &ring_shape(&shape, &window, name, tokens.len()))?;
            Ok(match window.dtype {
                DType::F16 => bytes.as_chunks::<2>().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
                DType::Bf16 => bytes.as_chunks::<2>().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
                _ => floats(bytes),
            })
        };
        let (window_k, window_v) = (ring("window_k")?, ring("window_v")?);
        let parts = StateParts { a: wide("a", &masses)?, b: wide("b", &sums)?, window_k, window_v };
        self.write_state(&parts, &tokens).map_err(|error| match error {
            Error::NonFinite { tensor, index, .. } => {
                bad_file(format!("tensor {tensor}: a value that no state has at {index:?}"))
            }
            other => other,
        })
    }

    /// As [`Race::state_from_bytes`], from a file.
    ///
    /// # Errors
    /// As [`Race::state_from_bytes`]; [`Error::File`] where the file cannot be read.
    pub fn load_state_from(&self, path: impl AsRef<Path>) -> Result<RaceState> {
        load(path.as_ref(), |bytes| self.state_from_bytes(bytes))
    }
}
