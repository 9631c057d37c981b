//! Saved caches: one safetensors file holds everything that a later process, on any device, needs to go on.
//!
//! The metadata has one entry, [`HEADER`], a JSON document (see [`Header`]). The tensors:
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
use crate::error::{Error, Result};
use crate::lsh::{BitLayout, Hyperplanes, Planes};
use crate::socket::cache::SocketCache;
use crate::socket::config::{CacheShape, SocketConfig};
use crate::socket::executor::SequenceData;
use crate::socket::problem::SeqState;
use crate::tensor::DType;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorView, serialize};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// The metadata entry that holds the [`Header`].
const HEADER: &str = "softhash.cache";
const FORMAT_VERSION: u32 = 1;
const CHECKSUM: &str = "sha256";
const CHECKSUM_BYTES: usize = 32;
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

/// Read on its own first: another version may have another header.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Clone, Copy, Serialize, Deserialize)]
struct Lengths {
    len: usize,
    indexed: usize,
}

fn bad_file(reason: impl Into<String>) -> Error {
    Error::File { op: "load", reason: reason.into() }
}

fn cannot_save(reason: impl Into<String>) -> Error {
    Error::File { op: "save", reason: reason.into() }
}

impl SocketCache {
    /// The whole cache as the bytes of a safetensors file with a format version and a checksum. Any device can load
    /// it. Takes about twice the cache's size in host memory while it runs.
    ///
    /// # Errors
    /// [`Error::DeviceLost`] and [`Error::OutOfMemory`] where the device cannot be read; [`Error::File`].
    pub fn to_bytes(&mut self) -> Result<Vec<u8>> {
        let spec = self.spec().clone();
        let shape = spec.shape;
        let bits = spec.config.layout().bits();
        let planes = Planes::new(&spec.config.hyperplanes, bits, shape.head_dim, shape.num_kv_heads)?;

        let mut tensors = BTreeMap::new();
        tensors.insert(CHECKSUM.to_string(), (Dtype::U8, vec![CHECKSUM_BYTES], vec![0; CHECKSUM_BYTES]));
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
        let header = Header { version: FORMAT_VERSION, config, shape, page_tokens: spec.page_tokens, sequences };
        let header = serde_json::to_string(&header).map_err(|e| cannot_save(e.to_string()))?;
        let views = tensors
            .iter()
            .map(|(name, (dtype, shape, data))| Ok((name, TensorView::new(*dtype, shape.clone(), data)?)))
            .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
        let mut bytes = views
            .and_then(|views| serialize(views, Some(HashMap::from([(HEADER.to_string(), header)]))))
            .map_err(|e| cannot_save(e.to_string()))?;

        let at = SafeTensors::read_metadata(&bytes).ok().and_then(|(n, metadata)| checksum_range(n, &metadata));
        let at = at.ok_or_else(|| cannot_save("the checksum has no place in the file"))?;
        let sum = checksum(&bytes, &at);
        bytes[at].copy_from_slice(&sum);
        Ok(bytes)
    }

    /// Writes [`SocketCache::to_bytes`] to a file. The file appears whole or not at all: it is written beside `path`,
    /// flushed to the disk and renamed, so what was there before stays until the new one is safe.
    ///
    /// # Errors
    /// As [`SocketCache::to_bytes`]; [`Error::File`] where the file cannot be written.
    pub fn save_to(&mut self, path: impl AsRef<Path>) -> Result<()> {
        let path = path.as_ref();
        let bytes = self.to_bytes()?;
        write_atomically(path, &bytes).map_err(|e| cannot_save(format!("{}: {e}", path.display())))
    }

    /// A cache from the bytes that [`SocketCache::to_bytes`] made, on this device, whichever device saved it.
    ///
    /// The bytes may come from anywhere: sizes, shapes, values and checksum are checked before they are used. The
    /// checksum finds damage, not forgery.
    ///
    /// # Errors
    /// [`Error::File`] naming what is wrong with the file; [`Error::Config`] for a saved configuration out of range;
    /// the errors of [`SocketCache::new`] and [`SocketCache::append`] where the device cannot hold it.
    pub fn from_bytes(device: &Device, bytes: &[u8]) -> Result<Self> {
        let file = SavedFile::open(bytes)?;
        let Header { mut config, shape, page_tokens, sequences, .. } = file.header()?;
        config.hyperplanes = file.hyperplanes(&config, shape)?;
        config.validate()?;

        // All of the file is checked before the device is asked for memory.
        let mut tensors = 2;
        for (n, &lengths) in sequences.iter().enumerate() {
            check_lengths(&config, n, lengths)?;
            for part in parts(&config, shape, lengths) {
                file.part(n, &part, config.layout())?;
                tensors += 1;
            }
        }
        if file.metadata.tensors().len() != tensors {
            let found = file.metadata.tensors().len();
            return Err(bad_file(format!("{found} tensors, a cache of {} sequences has {tensors}", sequences.len())));
        }

        let mut cache = Self::with_page_tokens(device, config, shape, 0, page_tokens)?;
        for (n, &lengths) in sequences.iter().enumerate() {
            if lengths.len == 0 {
                cache.add_sequence()?;
                continue;
            }
            let state = SeqState { len: lengths.len, indexed: lengths.indexed };
            let mut data = SequenceData { state, ..Default::default() };
            for part in parts(cache.config(), shape, lengths) {
                let bytes = file.part(n, &part, cache.config().layout())?;
                part.field.fill(&mut data, bytes);
            }
            cache.import(&data)?;
        }
        Ok(cache)
    }

    /// As [`SocketCache::from_bytes`], from a file.
    ///
    /// # Errors
    /// As [`SocketCache::from_bytes`]; [`Error::File`] where the file cannot be read.
    pub fn load_from(device: &Device, path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let named = |e: &dyn std::fmt::Display| bad_file(format!("{}: {e}", path.display()));
        // A pipe or a device file may never end.
        if !std::fs::metadata(path).map_err(|e| named(&e))?.is_file() {
            return Err(named(&"not a regular file"));
        }
        let bytes = std::fs::read(path).map_err(|e| named(&e))?;
        Self::from_bytes(device, &bytes).map_err(|e| match e {
            Error::File { reason, .. } => named(&reason),
            other => other,
        })
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

/// A file whose header and checksum are right.
struct SavedFile<'a> {
    metadata: Metadata,
    data: &'a [u8],
}

impl<'a> SavedFile<'a> {
    fn open(bytes: &'a [u8]) -> Result<Self> {
        // This bounds every declared size by the size of the file.
        let (header_bytes, metadata) =
            SafeTensors::read_metadata(bytes).map_err(|e| bad_file(format!("not a whole safetensors file: {e}")))?;
        let data = bytes.get(8 + header_bytes..).unwrap_or_default();
        let file = Self { metadata, data };
        let Version { version } = file.json()?;
        if version != FORMAT_VERSION {
            return Err(bad_file(format!("format version {version}, this library reads version {FORMAT_VERSION}")));
        }
        let at = checksum_range(header_bytes, &file.metadata)
            .ok_or_else(|| bad_file(format!("tensor {CHECKSUM} of {CHECKSUM_BYTES} bytes is missing")))?;
        let (stored, found) = (&bytes[at.clone()], checksum(bytes, &at));
        if stored != found {
            let (stored, found) = (hex(stored), hex(&found));
            return Err(bad_file(format!("the checksum is {stored}, the contents have {found}: the file is damaged")));
        }
        Ok(file)
    }

    fn json<T: for<'de> Deserialize<'de>>(&self) -> Result<T> {
        let text = self.metadata.metadata().as_ref().and_then(|m| m.get(HEADER));
        let text = text.ok_or_else(|| bad_file(format!("no {HEADER} entry in the metadata: not a saved cache")))?;
        serde_json::from_str(text).map_err(|e| bad_file(format!("{HEADER}: {e}")))
    }

    /// The header, its numbers checked so far that products of them cannot overflow.
    fn header(&self) -> Result<Header> {
        let header: Header = self.json()?;
        header.config.validate()?;
        header.shape.validate()?;
        let count = header.sequences.len();
        if count > MAX_SEQUENCES {
            return Err(bad_file(format!("{count} sequences, the limit is {MAX_SEQUENCES}")));
        }
        Ok(header)
    }

    /// The bytes of a tensor that must have this dtype and shape.
    fn tensor(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&'a [u8]> {
        let info = self.metadata.info(name).ok_or_else(|| bad_file(format!("tensor {name} is missing")))?;
        if info.dtype != dtype || info.shape != shape {
            let (found_dtype, found) = (info.dtype, &info.shape);
            return Err(bad_file(format!("tensor {name} is {found_dtype:?} {found:?}, expected {dtype:?} {shape:?}")));
        }
        let (start, end) = info.data_offsets;
        self.data.get(start..end).ok_or_else(|| bad_file(format!("tensor {name} ends outside the file")))
    }

    /// The bytes of a sequence's tensor, its values checked.
    fn part(&self, n: usize, part: &Part, layout: BitLayout) -> Result<&'a [u8]> {
        let name = part.tensor_name(n);
        let bytes = self.tensor(&name, part.dtype, &part.shape)?;
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
    fn hyperplanes(&self, config: &SocketConfig, shape: CacheShape) -> Result<Hyperplanes> {
        let bits = config.layout().bits();
        let sets = self.metadata.info("planes").and_then(|info| info.shape.first().copied()).unwrap_or(1);
        if sets != 1 && sets != shape.num_kv_heads {
            return Err(bad_file(format!("planes in {sets} sets, expected 1 or {}", shape.num_kv_heads)));
        }
        let bytes = self.tensor("planes", Dtype::F32, &[sets, bits, shape.head_dim])?;
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

fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b))
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    words(bytes).map(f32::from_bits).collect()
}

fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The first element whose exponent is all ones.
fn first_non_finite(bytes: &[u8], dtype: Dtype) -> Option<usize> {
    let halves =
        |exponent: u16| bytes.as_chunks::<2>().0.iter().position(|&b| u16::from_le_bytes(b) & exponent == exponent);
    match dtype {
        Dtype::F16 => halves(0x7c00),
        Dtype::BF16 => halves(0x7f80),
        _ => words(bytes).position(|x| x & 0x7f80_0000 == 0x7f80_0000),
    }
}

/// Where the checksum's bytes are in a file with a header of so many bytes.
fn checksum_range(header_bytes: usize, metadata: &Metadata) -> Option<std::ops::Range<usize>> {
    let info = metadata.info(CHECKSUM)?;
    let (start, end) = info.data_offsets;
    let data = 8 + header_bytes;
    (info.dtype == Dtype::U8 && info.shape == [CHECKSUM_BYTES]).then_some(data + start..data + end)
}

fn checksum(file: &[u8], at: &std::ops::Range<usize>) -> [u8; CHECKSUM_BYTES] {
    let mut hash = Sha256::new();
    hash.update(&file[..at.start]);
    hash.update([0; CHECKSUM_BYTES]);
    hash.update(&file[at.end..]);
    hash.finalize().into()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn write_atomically(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let temporary = temporary_beside(path)?;
    let written = (|| {
        let mut file = std::fs::File::options().write(true).create_new(true).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        drop(file);
        std::fs::rename(&temporary, path)
    })();
    if written.is_err() {
        // The first error is the one to report; a temporary that was never made cannot be removed.
        let _ = std::fs::remove_file(&temporary);
        return written;
    }
    // The new name is safe once its folder is; file systems that cannot do that lose no data by it.
    #[cfg(unix)]
    if let Some(folder) = temporary.parent() {
        let _ = std::fs::File::open(folder).and_then(|folder| folder.sync_all());
    }
    Ok(())
}

/// A name in the same folder, so that the rename stays within one file system; no two writers share it.
fn temporary_beside(path: &Path) -> std::io::Result<PathBuf> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path
        .file_name()
        .ok_or_else(|| std::io::Error::new(std::io::ErrorKind::InvalidInput, "the path names no file"))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
    let folder = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    Ok(folder.join(temporary))
}
