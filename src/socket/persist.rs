//! Saved caches: one safetensors file holds everything that a later process, on any device, needs to go on.
//!
//! The metadata has one entry, a JSON document (see [`Header`]). The tensors:
//!
//! | name | shape | dtype | where |
//! |---|---|---|---|
//! | `sha256` | 32 | U8 | SHA-256 of the whole file with these 32 bytes zero |
//! | `planes` | sets, tables · planes, `head_dim` | F32 | always; sets is 1 or `num_kv_heads` |
//! | `N.k` | len, `num_kv_heads`, `head_dim` | the cache's | for each sequence N |
//! | `N.v` | len, `num_kv_heads`, `value_dim` | the cache's | for each sequence |
//! | `N.bits` | indexed, `num_kv_heads`, words | U32 | for each sequence |
//! | `N.gain`, `N.bias` | indexed, `num_kv_heads` | F32 | where the scoring has that scalar |
//! | `N.mean` | `num_kv_heads`, `head_dim` | F32 | where keys are centred and the mean is taken |
//!
//! The hyperplanes are stored beside their seed, so that a file keeps its meaning should the seeded stream ever change.

use crate::device::Device;
use crate::error::Result;
use crate::file::{Format, SavedFile, bad_file, f32_bytes, first_non_finite, floats, load, save, seal, words};
use crate::lsh::{BitLayout, Hyperplanes, Planes};
use crate::socket::cache::SocketCache;
use crate::socket::config::{CacheShape, SocketConfig};
use crate::socket::executor::SequenceData;
use crate::socket::problem::SeqState;
use crate::tensor::DType;
use safetensors::tensor::Dtype;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// The metadata entry holds a [`Header`].
const FORMAT: Format = Format { entry: "softhash.cache", what: "cache", version: 1 };
const MAX_SEQUENCES: usize = 65536;

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    /// Supplied hyperplanes are left out here: the `planes` tensor holds them.
    config: SocketConfig,
    shape: CacheShape,
    page_tokens: usize,
    sequences: Vec<Lengths>,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Lengths {
    len: usize,
    indexed: usize,
}

impl SocketCache {
    /// The whole cache as the bytes of a safetensors file with a format version and a checksum. Any device can load
    /// it. Takes about twice the cache's size in host memory while it runs.
    ///
    /// # Errors
    /// [`crate::Error::DeviceLost`] and [`crate::Error::OutOfMemory`] where the device cannot be read; [`crate::Error::File`].
    pub fn to_bytes(&mut self) -> Result<Vec<u8>> {
        let spec = self.spec().clone();
        let shape = spec.shape;
        let bits = spec.config.layout().bits();
        let planes = Planes::new(&spec.config.hyperplanes, bits, shape.head_dim, shape.num_kv_heads)?;

        let mut tensors = BTreeMap::new();
        let rows = f32_bytes(&planes.rows);
        tensors.insert("planes".into(), (Dtype::F32, vec![planes.sets, bits, shape.head_dim], rows));
        let mut sequences = Vec::with_capacity(self.sequences());
        for n in 0..self.sequences() {
            let data = self.export(n)?;
            let lengths = Lengths { len: data.state.len, indexed: data.state.indexed };
            for part in parts(&spec.config, shape, lengths) {
                tensors.insert(part.tensor_name(n), (part.dtype, part.shape, part.field.bytes(&data)));
            }
            sequences.push(lengths);
        }

        let mut config = spec.config;
        if matches!(config.hyperplanes, Hyperplanes::Supplied(_)) {
            config.hyperplanes = Hyperplanes::Supplied(Arc::from([]));
        }
        let header = Header { version: FORMAT.version, config, shape, page_tokens: spec.page_tokens, sequences };
        seal(FORMAT, &header, tensors)
    }

    /// Writes [`SocketCache::to_bytes`] to a file. The file appears whole or not at all: it is written beside `path`,
    /// flushed to the disk and renamed, so what was there before stays until the new one is safe.
    ///
    /// # Errors
    /// As [`SocketCache::to_bytes`]; [`crate::Error::File`] where the file cannot be written.
    pub fn save_to(&mut self, path: impl AsRef<Path>) -> Result<()> {
        save(path.as_ref(), &self.to_bytes()?)
    }

    /// A cache from the bytes that [`SocketCache::to_bytes`] made, on this device, whichever device saved it.
    ///
    /// The bytes may come from anywhere: sizes, shapes, values and checksum are checked before they are used. The
    /// checksum finds damage, not forgery.
    ///
    /// # Errors
    /// [`crate::Error::File`] naming what is wrong with the file; [`crate::Error::Config`] for a saved configuration out of range;
    /// the errors of [`SocketCache::new`] and [`SocketCache::append`] where the device cannot hold it.
    pub fn from_bytes(device: &Device, bytes: &[u8]) -> Result<Self> {
        let file = SavedFile::open(FORMAT, bytes)?;
        let Header { mut config, shape, page_tokens, sequences, .. } = header(&file)?;
        config.hyperplanes = hyperplanes(&file, &config, shape)?;
        config.validate()?;

        // All of the file is checked before the device is asked for memory.
        let mut tensors = 1;
        for (n, &lengths) in sequences.iter().enumerate() {
            check_lengths(&config, n, lengths)?;
            for part in parts(&config, shape, lengths) {
                checked_part(&file, n, &part, config.layout())?;
                tensors += 1;
            }
        }
        file.check_count(tensors)?;

        let mut cache = Self::with_page_tokens(device, config, shape, 0, page_tokens)?;
        for (n, &lengths) in sequences.iter().enumerate() {
            if lengths.len == 0 {
                cache.add_sequence()?;
                continue;
            }
            let state = SeqState { len: lengths.len, indexed: lengths.indexed };
            let mut data = SequenceData { state, ..Default::default() };
            for part in parts(cache.config(), shape, lengths) {
                let bytes = checked_part(&file, n, &part, cache.config().layout())?;
                part.field.fill(&mut data, bytes);
            }
            cache.import(&data)?;
        }
        Ok(cache)
    }

    /// As [`SocketCache::from_bytes`], from a file.
    ///
    /// # Errors
    /// As [`SocketCache::from_bytes`]; [`crate::Error::File`] where the file cannot be read.
    pub fn load_from(device: &Device, path: impl AsRef<Path>) -> Result<Self> {
        load(path.as_ref(), |bytes| Self::from_bytes(device, bytes))
    }
}

/// One tensor of a sequence, as a file must hold it.
struct Part {
    field: Field,
    dtype: Dtype,
    shape: Vec<usize>,
}

impl Part {
    fn tensor_name(&self, sequence: usize) -> String {
        format!("{sequence}.{}", self.field.name())
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Field {
    K,
    V,
    Bits,
    Gain,
    Bias,
    Mean,
}

impl Field {
    fn name(self) -> &'static str {
        match self {
            Self::K => "k",
            Self::V => "v",
            Self::Bits => "bits",
            Self::Gain => "gain",
            Self::Bias => "bias",
            Self::Mean => "mean",
        }
    }

    fn bytes(self, data: &SequenceData) -> Vec<u8> {
        match self {
            Self::K => data.k.clone(),
            Self::V => data.v.clone(),
            Self::Bits => data.bits.iter().flat_map(|x| x.to_le_bytes()).collect(),
            Self::Gain => f32_bytes(&data.gain),
            Self::Bias => f32_bytes(&data.bias),
            Self::Mean => f32_bytes(&data.mean),
        }
    }

    fn fill(self, data: &mut SequenceData, bytes: &[u8]) {
        match self {
            Self::K => data.k = bytes.to_vec(),
            Self::V => data.v = bytes.to_vec(),
            Self::Bits => data.bits = words(bytes).collect(),
            Self::Gain => data.gain = floats(bytes),
            Self::Bias => data.bias = floats(bytes),
            Self::Mean => data.mean = floats(bytes),
        }
    }
}

/// The tensors of a sequence, in full.
fn parts(config: &SocketConfig, shape: CacheShape, lengths: Lengths) -> Vec<Part> {
    let Lengths { len, indexed } = lengths;
    let heads = shape.num_kv_heads;
    let float = stored_dtype(shape.dtype);
    let scalars = config.scalars();
    let mut parts = vec![
        Part { field: Field::K, dtype: float, shape: vec![len, heads, shape.head_dim] },
        Part { field: Field::V, dtype: float, shape: vec![len, heads, shape.value_dim] },
        Part { field: Field::Bits, dtype: Dtype::U32, shape: vec![indexed, heads, config.layout().words()] },
    ];
    for (field, present) in [(Field::Gain, scalars.gain), (Field::Bias, scalars.bias)] {
        if present {
            parts.push(Part { field, dtype: Dtype::F32, shape: vec![indexed, heads] });
        }
    }
    if config.center.is_some() && indexed > 0 {
        parts.push(Part { field: Field::Mean, dtype: Dtype::F32, shape: vec![heads, shape.head_dim] });
    }
    parts
}

fn stored_dtype(dtype: DType) -> Dtype {
    match dtype {
        DType::F32 => Dtype::F32,
        DType::F16 => Dtype::F16,
        DType::Bf16 => Dtype::BF16,
        DType::I32 => Dtype::I32,
    }
}

/// All keys of a sequence are hashed, or none while the mean is awaited.
fn check_lengths(config: &SocketConfig, n: usize, lengths: Lengths) -> Result<()> {
    let Lengths { len, indexed } = lengths;
    let expected = match config.center {
        Some(c) if len < c => 0,
        _ => len,
    };
    if indexed == expected {
        return Ok(());
    }
    Err(bad_file(format!("sequence {n} of {len} tokens has {indexed} indexed, expected {expected}")))
}

/// The header, its numbers checked so far that products of them cannot overflow.
fn header(file: &SavedFile<'_>) -> Result<Header> {
    let header: Header = file.header()?;
    header.config.validate()?;
    header.shape.validate()?;
    let count = header.sequences.len();
    if count > MAX_SEQUENCES {
        return Err(bad_file(format!("{count} sequences, the limit is {MAX_SEQUENCES}")));
    }
    Ok(header)
}

/// The bytes of a sequence's tensor, its values checked.
fn checked_part<'a>(file: &SavedFile<'a>, n: usize, part: &Part, layout: BitLayout) -> Result<&'a [u8]> {
    let name = part.tensor_name(n);
    let bytes = file.tensor(&name, part.dtype, &part.shape)?;
    let refuse = |i: usize, what: &str| Err(bad_file(format!("tensor {name}: {what} at element {i}")));
    match part.field {
        Field::K | Field::V | Field::Mean => match first_non_finite(bytes, part.dtype) {
            Some(i) => refuse(i, "NaN or infinity"),
            None => Ok(bytes),
        },
        // ln ‖v‖ of a zero value is −∞, so only NaN is wrong.
        Field::Gain | Field::Bias => match floats(bytes).iter().position(|x| x.is_nan()) {
            Some(i) => refuse(i, "NaN"),
            None => Ok(bytes),
        },
        Field::Bits => {
            let used = used_bits(layout);
            match words(bytes).zip(used.iter().cycle()).position(|(word, used)| word & !used != 0) {
                Some(i) => refuse(i, "bits set outside the code"),
                None => Ok(bytes),
            }
        }
    }
}

/// The configured hyperplanes where they make the stored rows, else the stored rows.
fn hyperplanes(file: &SavedFile<'_>, config: &SocketConfig, shape: CacheShape) -> Result<Hyperplanes> {
    let bits = config.layout().bits();
    let sets = file.shape("planes").and_then(|shape| shape.first().copied()).unwrap_or(1);
    if sets != 1 && sets != shape.num_kv_heads {
        return Err(bad_file(format!("planes in {sets} sets, expected 1 or {}", shape.num_kv_heads)));
    }
    let bytes = file.tensor("planes", Dtype::F32, &[sets, bits, shape.head_dim])?;
    if let Some(i) = first_non_finite(bytes, Dtype::F32) {
        return Err(bad_file(format!("tensor planes: NaN or infinity at element {i}")));
    }
    let stored = floats(bytes);
    if !matches!(config.hyperplanes, Hyperplanes::Supplied(_)) {
        let made = Planes::new(&config.hyperplanes, bits, shape.head_dim, shape.num_kv_heads)?;
        if made.rows == stored {
            return Ok(config.hyperplanes.clone());
        }
        tracing::warn!("the seeded hyperplanes differ from the saved ones: going on with the saved ones");
    }
    Ok(Hyperplanes::Supplied(stored.into()))
}

/// Which bits of each word of a key hold codes.
fn used_bits(layout: BitLayout) -> Vec<u32> {
    let mut used = vec![0; layout.words()];
    for l in 0..layout.tables {
        for p in 0..layout.planes {
            let (word, bit) = layout.position(l, p);
            used[word] |= 1 << bit;
        }
    }
    used
}
