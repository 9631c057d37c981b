//! Checksums of compiled code that leaves the process: drivers trust such data, and files get torn.

use sha2::{Digest, Sha256};

/// Puts a checksum before `data`.
pub(crate) fn sealed(data: &[u8]) -> Vec<u8> {
    let mut out = Sha256::digest(data).to_vec();
    out.extend_from_slice(data);
    out
}

/// The data behind its checksum; `None` where they do not agree.
pub(crate) fn unsealed(sealed: &[u8]) -> Option<&[u8]> {
    let (sum, data) = sealed.split_at_checked(32)?;
    (sum == Sha256::digest(data).as_slice()).then_some(data)
}
