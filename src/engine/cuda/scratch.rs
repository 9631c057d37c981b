//! Memory that calls share.

use super::context::Context;
use super::memory::Buffer;
use crate::error::Result;
use std::sync::Arc;

/// Memory for intermediate results, grown as needed; work submitted earlier keeps what it was given.
#[derive(Debug, Default)]
pub(crate) struct Scratch(Option<Buffer>);

impl Scratch {
    /// At least `bytes`, which hold anything. Once as much was asked for, nothing is allocated any more.
    ///
    /// # Errors
    /// [`crate::Error::OutOfMemory`], [`crate::Error::DeviceLost`].
    pub fn get(&mut self, ctx: &Arc<Context>, op: &'static str, bytes: u64) -> Result<Buffer> {
        match &self.0 {
            Some(buffer) if buffer.size() >= bytes => Ok(buffer.clone()),
            _ => {
                // Some room to grow, so that a growing context does not allocate at every step.
                let buffer = ctx.uninit(op, bytes.saturating_add(bytes / 4)).or_else(|_| ctx.uninit(op, bytes))?;
                self.0 = Some(buffer.clone());
                Ok(buffer)
            }
        }
    }

    pub fn bytes(&self) -> u64 {
        self.0.as_ref().map_or(0, Buffer::size)
    }
}
