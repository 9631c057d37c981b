//! Reading buffers back, without ever waiting on a device that is gone.

use super::context::Context;
#[cfg(not(target_arch = "wasm32"))]
use crate::engine::lost::Lost;
#[cfg(not(target_arch = "wasm32"))]
use crate::engine::waiter::Waiter;
use crate::error::{Error, Result};
use futures::channel::oneshot;
#[cfg(not(target_arch = "wasm32"))]
use std::panic::{AssertUnwindSafe, catch_unwind};

/// How long one wait for the GPU lasts before the device's life is checked again.
#[cfg(not(target_arch = "wasm32"))]
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(1);

/// Reads buffers through staging copies. Off the browser somebody has to poll the device while a read is under way:
/// the calling thread where it may block, else a thread that starts with the first asynchronous read.
#[derive(Debug, Default)]
pub(super) struct Readback {
    #[cfg(not(target_arch = "wasm32"))]
    waiter: Waiter,
}

/// A copy under way.
struct Pending {
    staging: wgpu::Buffer,
    mapped: oneshot::Receiver<Result<(), wgpu::BufferAsyncError>>,
    #[cfg_attr(target_arch = "wasm32", allow(dead_code))]
    index: wgpu::SubmissionIndex,
    /// Bytes of the copy before the range asked for.
    skip: usize,
    bytes: usize,
}

impl Readback {
    pub async fn read(
        &self,
        ctx: &Context,
        op: &'static str,
        buffer: &wgpu::Buffer,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>> {
        let Some(pending) = Pending::start(ctx, op, buffer, offset, bytes)? else { return Ok(Vec::new()) };
        #[cfg(not(target_arch = "wasm32"))]
        {
            let (device, lost, index) = (ctx.device().clone(), ctx.lost().clone(), pending.index.clone());
            let waited = self.waiter.run(move || wait(&device, &lost, &index)).await;
            let waited = waited.unwrap_or_else(|| Err("the polling thread ended".into()));
            waited.map_err(|message| ctx.gone_or(op, message))?;
        }
        let mapped = pending.mapped.await;
        finish(ctx, op, &pending.staging, mapped, pending.skip, pending.bytes)
    }

    /// Waits until all submitted work is done.
    #[cfg(not(target_arch = "wasm32"))]
    pub fn settle(&self, ctx: &Context, op: &'static str) -> Result<()> {
        let index = ctx.submit_indexed(op, ctx.encoder("settle"))?;
        wait(ctx.device(), ctx.lost(), &index).map_err(|message| ctx.gone_or(op, message))
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub fn read_blocking(
        &self,
        ctx: &Context,
        op: &'static str,
        buffer: &wgpu::Buffer,
        offset: u64,
        bytes: u64,
    ) -> Result<Vec<u8>> {
        let Some(pending) = Pending::start(ctx, op, buffer, offset, bytes)? else { return Ok(Vec::new()) };
        wait(ctx.device(), ctx.lost(), &pending.index).map_err(|message| ctx.gone_or(op, message))?;
        // Another thread's poll may have taken the mapping up and be about to announce it.
        let mapped = pollster::block_on(pending.mapped);
        finish(ctx, op, &pending.staging, mapped, pending.skip, pending.bytes)
    }
}

impl Pending {
    /// Submits the copy and asks for the mapping. `None` for an empty range.
    fn start(ctx: &Context, op: &'static str, buffer: &wgpu::Buffer, offset: u64, bytes: u64) -> Result<Option<Self>> {
        ctx.check_alive(op)?;
        if bytes == 0 {
            return Ok(None);
        }
        // Copies start and end at multiples of four bytes.
        let first = offset & !3;
        let end = offset.saturating_add(bytes).checked_next_multiple_of(4).unwrap_or(u64::MAX);
        if end > buffer.size() {
            return Err(Error::Limit { op, what: "end of the read in bytes", value: end, limit: buffer.size() });
        }
        let usage = wgpu::BufferUsages::MAP_READ | wgpu::BufferUsages::COPY_DST;
        let staging = ctx.buffer(op, "readback", end - first, usage)?;
        let mut encoder = ctx.encoder("readback");
        encoder.copy_buffer_to_buffer(buffer, first, &staging, 0, end - first);
        let index = ctx.submit_indexed(op, encoder)?;
        let (sender, mapped) = oneshot::channel();
        ctx.scoped(op, || {
            staging.map_async(wgpu::MapMode::Read, .., move |result| {
                // Nobody listens where the read was dropped meanwhile.
                let _ = sender.send(result);
            });
        })?;
        Ok(Some(Self { staging, mapped, index, skip: (offset - first) as usize, bytes: bytes as usize }))
    }
}

fn finish(
    ctx: &Context,
    op: &'static str,
    staging: &wgpu::Buffer,
    mapped: Result<Result<(), wgpu::BufferAsyncError>, oneshot::Canceled>,
    skip: usize,
    bytes: usize,
) -> Result<Vec<u8>> {
    let failed = |message: String| ctx.gone_or(op, message);
    mapped.map_err(|_| failed("the mapping was dropped".into()))?.map_err(|error| failed(error.to_string()))?;
    let view = staging.get_mapped_range(..).map_err(|error| failed(error.to_string()))?;
    view.get(skip..skip + bytes).map(<[u8]>::to_vec).ok_or_else(|| failed("the mapping is too short".into()))
}

/// Polls until the submission is done. wgpu panics where the driver reports the device's loss during a poll, which must
/// not take the caller down.
#[cfg(not(target_arch = "wasm32"))]
fn wait(device: &wgpu::Device, lost: &Lost, index: &wgpu::SubmissionIndex) -> Result<(), String> {
    loop {
        let poll = wgpu::PollType::Wait { submission_index: Some(index.clone()), timeout: Some(PATIENCE) };
        match catch_unwind(AssertUnwindSafe(|| device.poll(poll))) {
            Ok(Ok(_)) => return Ok(()),
            Ok(Err(wgpu::PollError::Timeout)) => {
                lost.check("read").map_err(|error| error.to_string())?;
            }
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => {
                lost.set("the driver failed while waiting".into());
                return Err("the driver failed while waiting".into());
            }
        }
    }
}
