//! The wgpu engine: context, pipelines, parameters, readback.

use crate::error::Result;

/// A device, its queue and what was found out about them.
#[derive(Debug)]
pub(crate) struct Context {}

impl Context {
    pub async fn read_buffer(
        &self,
        _op: &'static str,
        _b: &wgpu::Buffer,
        _offset: u64,
        _bytes: u64,
    ) -> Result<Vec<u8>> {
        Ok(Vec::new())
    }
}
