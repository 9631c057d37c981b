//! The tokens to score: a byte-level text, or token ids made elsewhere.

use std::path::Path;

use crate::{Result, fail};

/// A stream of token ids.
pub struct Tokens {
    /// The ids.
    pub ids: Vec<u32>,
    /// Bytes of text that one token stands for, on average.
    pub bytes_per_token: f64,
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|e| format!("{}: {e}", path.display()).into())
}

/// The bytes of a file as ids, for models whose vocabulary is the 256 bytes.
pub fn bytes(path: &Path) -> Result<Tokens> {
    let ids = read(path)?.into_iter().map(u32::from).collect();
    Ok(Tokens { ids, bytes_per_token: 1.0 })
}

/// A file of little-endian u32 ids that stand for `bytes` bytes of text.
pub fn ids(path: &Path, bytes: u64) -> Result<Tokens> {
    let data = read(path)?;
    if data.is_empty() || !data.len().is_multiple_of(4) {
        return fail(format!("{}: {} bytes, expected one or more u32", path.display(), data.len()));
    }
    let ids: Vec<u32> = data.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
    let bytes_per_token = bytes as f64 / ids.len() as f64;
    Ok(Tokens { ids, bytes_per_token })
}

impl Tokens {
    /// `count` windows of `length` ids, spread evenly over the stream, none overlapping.
    pub fn windows(&self, count: usize, length: usize) -> Result<Vec<&[u32]>> {
        let stride = self.ids.len() / count;
        if stride < length {
            let have = self.ids.len();
            return fail(format!("{count} windows of {length} tokens do not fit into the {have} tokens of the text"));
        }
        Ok((0..count).map(|w| &self.ids[w * stride..w * stride + length]).collect())
    }
}
