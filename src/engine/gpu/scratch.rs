//! Buffers that calls share.

use super::context::Context;
use crate::error::{Error, Result};

const STORAGE: wgpu::BufferUsages =
    wgpu::BufferUsages::STORAGE.union(wgpu::BufferUsages::COPY_SRC).union(wgpu::BufferUsages::COPY_DST);

/// A buffer for intermediate results, grown as needed; commands recorded earlier keep the one that they were given.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Option<wgpu::Buffer>);

impl Scratch {
    /// A buffer of at least `bytes`, which holds anything.
    ///
    /// # Errors
    /// [`Error::Limit`] for what no binding can hold, [`Error::OutOfMemory`].
    pub fn get(&mut self, ctx: &Context, op: &'static str, what: &'static str, bytes: u64) -> Result<wgpu::Buffer> {
        let limit = ctx.caps().max_storage_binding;
        if bytes > limit {
            return Err(Error::Limit { op, what, value: bytes, limit });
        }
        match &self.0 {
            Some(buffer) if buffer.size() >= bytes => Ok(buffer.clone()),
            _ => {
                // Some room to grow, so that a growing context does not allocate at every step.
                let wish = (bytes + bytes / 4).min(limit).next_multiple_of(256).max(bytes);
                let buffer = ctx.buffer(op, what, wish.min(limit / 4 * 4).max(bytes), STORAGE)?;
                self.0 = Some(buffer.clone());
                Ok(buffer)
            }
        }
    }

    pub fn bytes(&self) -> u64 {
        self.0.as_ref().map_or(0, wgpu::Buffer::size)
    }
}
