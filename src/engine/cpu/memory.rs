//! Memory that is aligned to cache lines, zeroed lazily by the system, and refused rather than aborted on.

use crate::error::{Error, Result};
use bytemuck::Pod;

const LINE: usize = 64;

/// Zeroed bytes that start on a cache line.
#[derive(Clone, Debug)]
pub(crate) struct Buffer {
    bytes: Box<[u8]>,
    start: usize,
    len: usize,
}

impl Buffer {
    /// Room for `elements` values of `T`. The system hands out zeroed pages on first touch, so room that is never
    /// written costs address space alone; an aligned allocation would be written through at once.
    pub fn zeroed<T: Pod>(op: &'static str, elements: usize) -> Result<Self> {
        let bytes_asked = (elements as u64).saturating_mul(size_of::<T>() as u64);
        let failed = || Error::out_of_memory(op, bytes_asked);
        let len = elements.checked_mul(size_of::<T>()).ok_or_else(failed)?;
        let room = len.checked_add(LINE).ok_or_else(failed)?;
        let bytes: Box<[u8]> = bytemuck::allocation::try_zeroed_slice_box(room).map_err(|()| failed())?;
        let start = bytes.as_ptr().align_offset(LINE).min(LINE);
        Ok(Self { bytes, start, len })
    }

    pub fn slice<T: Pod>(&self) -> &[T] {
        bytemuck::cast_slice(&self.bytes[self.start..self.start + self.len])
    }

    pub fn slice_mut<T: Pod>(&mut self) -> &mut [T] {
        bytemuck::cast_slice_mut(&mut self.bytes[self.start..self.start + self.len])
    }

    /// Bytes in use.
    pub fn len(&self) -> usize {
        self.len
    }
}

/// A vector of `len` zeros.
pub(crate) fn zeros<T: Pod>(op: &'static str, len: usize) -> Result<Vec<T>> {
    let bytes = (len as u64).saturating_mul(size_of::<T>() as u64);
    let mut zeros = bytemuck::allocation::try_zeroed_vec(len).map_err(|()| Error::out_of_memory(op, bytes))?;
    ask_for_large_pages(&mut zeros);
    Ok(zeros)
}

/// Where the system hands out large pages on request only, requests them: touching fresh memory by small pages can cost
/// more than what is computed into it. A hint; nothing depends on it.
#[cfg_attr(not(all(target_os = "linux", target_pointer_width = "64")), allow(clippy::ptr_arg, unused_variables))]
fn ask_for_large_pages<T: Pod>(room: &mut Vec<T>) {
    #[cfg(all(target_os = "linux", target_pointer_width = "64"))]
    {
        use std::ffi::{c_int, c_void};
        const LARGE: usize = 2 << 20;
        const HUGEPAGE: c_int = 14;
        unsafe extern "C" {
            safe fn madvise(start: *mut c_void, len: usize, advice: c_int) -> c_int;
        }
        let len = size_of_val(room.as_slice());
        if len >= 2 * LARGE {
            let start = room.as_mut_ptr().cast::<u8>();
            let skipped = start.align_offset(LARGE).min(len);
            // Whole pages inside the vector only; the system refuses what it does not know.
            let _ = madvise(start.wrapping_add(skipped).cast(), (len - skipped) / LARGE * LARGE, HUGEPAGE);
        }
    }
}
