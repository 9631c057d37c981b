//! Times on the GPU's own clock.

use super::context::Context;
use crate::error::{Error, Result};
use std::sync::Arc;

/// Pairs of timestamps on the GPU's clock.
///
/// A pair brackets whatever is recorded between [`Timer::begin`] and [`Timer::end`], or one pass.
#[derive(Debug)]
pub struct Timer {
    context: Arc<Context>,
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    spans: u32,
}

impl Timer {
    /// Room for `spans` pairs; `None` where the device has no timestamps.
    pub(crate) fn new(context: &Arc<Context>, spans: u32) -> Result<Option<Self>> {
        const OP: &str = "timer";
        if !context.caps().timestamps {
            return Ok(None);
        }
        if spans == 0 || spans > wgpu::QUERY_SET_MAX_QUERIES / 2 {
            let limit = u64::from(wgpu::QUERY_SET_MAX_QUERIES / 2);
            return Err(Error::Limit { op: OP, what: "spans", value: spans.into(), limit });
        }
        context.check_alive(OP)?;
        let queries = context.scoped(OP, || {
            context.device().create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timer"),
                ty: wgpu::QueryType::Timestamp,
                count: 2 * spans,
            })
        })?;
        let usage = wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC;
        let resolved = context.buffer(OP, "timer", u64::from(spans) * 16, usage)?;
        Ok(Some(Self { context: context.clone(), queries, resolved, spans }))
    }

    /// How a compute pass is described so that span `span` brackets it.
    pub fn pass(&self, span: u32) -> wgpu::ComputePassTimestampWrites<'_> {
        wgpu::ComputePassTimestampWrites {
            query_set: &self.queries,
            beginning_of_pass_write_index: Some(2 * span),
            end_of_pass_write_index: Some(2 * span + 1),
        }
    }

    /// Marks the begin of span `span` at this point of the encoder.
    pub fn begin(&self, encoder: &mut wgpu::CommandEncoder, span: u32) {
        self.mark(encoder, 2 * span);
    }

    /// Marks the end of span `span` at this point of the encoder.
    pub fn end(&self, encoder: &mut wgpu::CommandEncoder, span: u32) {
        self.mark(encoder, 2 * span + 1);
    }

    /// An empty pass is the one place where every backend can write a timestamp.
    fn mark(&self, encoder: &mut wgpu::CommandEncoder, query: u32) {
        drop(encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("timestamp"),
            timestamp_writes: Some(wgpu::ComputePassTimestampWrites {
                query_set: &self.queries,
                beginning_of_pass_write_index: Some(query),
                end_of_pass_write_index: None,
            }),
        }));
    }

    /// Records the transfer of all timestamps to where [`Timer::read_blocking`] finds them. Every span must have been
    /// recorded before.
    pub fn resolve(&self, encoder: &mut wgpu::CommandEncoder) {
        encoder.resolve_query_set(&self.queries, 0..2 * self.spans, &self.resolved, 0);
    }

    /// Nanoseconds of each span, once the commands are submitted. `None` for a span whose stamps are zero or run
    /// backwards, as some drivers give; take wall-clock time there, and say so.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub async fn read(&self) -> Result<Vec<Option<f64>>> {
        let bytes = self.context.read_buffer("timer", &self.resolved, 0, self.resolved.size()).await?;
        Ok(self.spans_of(&bytes))
    }

    /// As [`Timer::read`], waiting for it.
    ///
    /// # Errors
    /// As [`Timer::read`].
    #[cfg(not(target_arch = "wasm32"))]
    pub fn read_blocking(&self) -> Result<Vec<Option<f64>>> {
        let bytes = self.context.read_buffer_blocking("timer", &self.resolved, 0, self.resolved.size())?;
        Ok(self.spans_of(&bytes))
    }

    fn spans_of(&self, bytes: &[u8]) -> Vec<Option<f64>> {
        let period = f64::from(self.context.caps().timestamp_period);
        let ticks: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|b| b.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte)))
            .collect();
        let span = |pair: &[u64]| match *pair {
            [begin, end] if begin != 0 && end >= begin => Some((end - begin) as f64 * period),
            _ => None,
        };
        ticks.chunks_exact(2).map(span).collect()
    }
}
