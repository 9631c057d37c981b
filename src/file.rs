//! Saved files: safetensors with a JSON header in the metadata, a format version and a checksum.
//!
//! The tensor `sha256` (32 bytes) is the SHA-256 of the whole file with these bytes zero. It finds damage, not forgery.

use crate::error::{Error, Result};
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorView, serialize};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

const CHECKSUM: &str = "sha256";
const CHECKSUM_BYTES: usize = 32;

/// What kind of file: the metadata entry that holds its header, and the version written and read.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Format {
    pub entry: &'static str,
    /// What is saved, in a word.
    pub what: &'static str,
    pub version: u32,
}

/// Every header has it; read on its own first, since another version may have another header.
#[derive(Deserialize)]
struct Version {
    version: u32,
}

/// Name, dtype, shape and bytes of a tensor to save.
pub(crate) type Saved = (Dtype, Vec<usize>, Vec<u8>);

pub(crate) fn bad_file(reason: impl Into<String>) -> Error {
    Error::File { op: "load", reason: reason.into() }
}

pub(crate) fn cannot_save(reason: impl Into<String>) -> Error {
    Error::File { op: "save", reason: reason.into() }
}

/// The bytes of a file. The header must serialise with a field `version`.
pub(crate) fn seal(format: Format, header: &impl Serialize, mut tensors: BTreeMap<String, Saved>) -> Result<Vec<u8>> {
    tensors.insert(CHECKSUM.to_string(), (Dtype::U8, vec![CHECKSUM_BYTES], vec![0; CHECKSUM_BYTES]));
    let header = serde_json::to_string(header).map_err(|e| cannot_save(e.to_string()))?;
    let views = tensors
        .iter()
        .map(|(name, (dtype, shape, data))| Ok((name, TensorView::new(*dtype, shape.clone(), data)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
    let mut bytes = views
        .and_then(|views| serialize(views, Some(HashMap::from([(format.entry.to_string(), header)]))))
        .map_err(|e| cannot_save(e.to_string()))?;
    let at = SafeTensors::read_metadata(&bytes).ok().and_then(|(n, metadata)| checksum_range(n, &metadata));
    let at = at.ok_or_else(|| cannot_save("the checksum has no place in the file"))?;
    let sum = checksum(&bytes, &at);
    bytes[at].copy_from_slice(&sum);
    Ok(bytes)
}

/// A file whose version and checksum are right.
pub(crate) struct SavedFile<'a> {
    format: Format,
    metadata: Metadata,
    data: &'a [u8],
}

impl<'a> SavedFile<'a> {
    pub fn open(format: Format, bytes: &'a [u8]) -> Result<Self> {
        // This bounds every declared size by the size of the file.
        let (header_bytes, metadata) =
            SafeTensors::read_metadata(bytes).map_err(|e| bad_file(format!("not a whole safetensors file: {e}")))?;
        let data = bytes.get(8 + header_bytes..).unwrap_or_default();
        let file = Self { format, metadata, data };
        let Version { version } = file.header()?;
        if version != format.version {
            let reads = format.version;
            return Err(bad_file(format!("format version {version}, this library reads version {reads}")));
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

    /// The header, as written by whoever made the file: its numbers may be anything.
    pub fn header<T: for<'de> Deserialize<'de>>(&self) -> Result<T> {
        let Format { entry, what, .. } = self.format;
        let text = self.metadata.metadata().as_ref().and_then(|m| m.get(entry));
        let text = text.ok_or_else(|| bad_file(format!("no {entry} entry in the metadata: not a saved {what}")))?;
        serde_json::from_str(text).map_err(|e| bad_file(format!("{entry}: {e}")))
    }

    /// Refuses a file with more tensors than those expected beside the checksum.
    pub fn check_count(&self, expected: usize) -> Result<()> {
        let found = self.metadata.tensors().len();
        if found == expected + 1 {
            return Ok(());
        }
        Err(bad_file(format!("{found} tensors, this {} has {}", self.format.what, expected + 1)))
    }

    /// The declared shape of a tensor.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.metadata.info(name).map(|info| info.shape.as_slice())
    }

    /// The bytes of a tensor that must have this dtype and shape.
    pub fn tensor(&self, name: &str, dtype: Dtype, shape: &[usize]) -> Result<&'a [u8]> {
        let info = self.metadata.info(name).ok_or_else(|| bad_file(format!("tensor {name} is missing")))?;
        if info.dtype != dtype || info.shape != shape {
            let (found_dtype, found) = (info.dtype, &info.shape);
            return Err(bad_file(format!("tensor {name} is {found_dtype:?} {found:?}, expected {dtype:?} {shape:?}")));
        }
        let (start, end) = info.data_offsets;
        self.data.get(start..end).ok_or_else(|| bad_file(format!("tensor {name} ends outside the file")))
    }
}

/// Writes a file whole or not at all: beside `path`, flushed to the disk and renamed, so that what was there before
/// stays until the new one is safe.
pub(crate) fn save(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, bytes).map_err(|e| cannot_save(format!("{}: {e}", path.display())))
}

/// Reads a file whole and makes something of it; errors name the file.
pub(crate) fn load<T>(path: &Path, make: impl FnOnce(&[u8]) -> Result<T>) -> Result<T> {
    let named = |e: &dyn std::fmt::Display| bad_file(format!("{}: {e}", path.display()));
    // A pipe or a device file may never end.
    if !std::fs::metadata(path).map_err(|e| named(&e))?.is_file() {
        return Err(named(&"not a regular file"));
    }
    let bytes = std::fs::read(path).map_err(|e| named(&e))?;
    make(&bytes).map_err(|e| match e {
        Error::File { reason, .. } => named(&reason),
        other => other,
    })
}

pub(crate) fn words(bytes: &[u8]) -> impl Iterator<Item = u32> + '_ {
    bytes.as_chunks::<4>().0.iter().map(|&b| u32::from_le_bytes(b))
}

pub(crate) fn floats(bytes: &[u8]) -> Vec<f32> {
    words(bytes).map(f32::from_bits).collect()
}

pub(crate) fn f32_bytes(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|x| x.to_le_bytes()).collect()
}

/// The first element whose exponent is all ones.
pub(crate) fn first_non_finite(bytes: &[u8], dtype: Dtype) -> Option<usize> {
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
        {
            // Closed before it is renamed, which some systems ask for.
            let mut file = std::fs::File::options().write(true).create_new(true).open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
        }
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
