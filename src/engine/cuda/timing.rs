//! Times on the GPU's own clock.

use super::context::Context;
use super::driver::Version;
use crate::error::{Error, Result};
use cudarc::driver::result;
use cudarc::driver::sys::{self, CUevent_flags};
use std::sync::Arc;

/// The first driver whose call for the time between events the bindings know.
const NEEDED: Version = Version(12, 8);
/// Pairs of one timer.
const MOST: u32 = 4096;

/// Pairs of events on the GPU's clock, of half a microsecond.
#[derive(Debug)]
pub struct CudaTimer {
    ctx: Arc<Context>,
    events: Vec<sys::CUevent>,
}

pub(crate) use CudaTimer as Timer;

// SAFETY: events are handles that the driver lets any thread use.
unsafe impl Send for CudaTimer {}
// SAFETY: as above.
unsafe impl Sync for CudaTimer {}

impl CudaTimer {
    /// Room for `spans` pairs; `None` where the driver is too old.
    pub(crate) fn new(ctx: &Arc<Context>, spans: u32) -> Result<Option<Self>> {
        let op = "timer";
        ctx.bind(op)?;
        if ctx.caps().driver < NEEDED {
            return Ok(None);
        }
        if spans == 0 || spans > MOST {
            return Err(Error::Limit { op, what: "spans", value: spans.into(), limit: MOST.into() });
        }
        let mut timer = Self { ctx: ctx.clone(), events: Vec::with_capacity(2 * spans as usize) };
        for _ in 0..2 * spans {
            timer.events.push(ctx.check(op, result::event::create(CUevent_flags::CU_EVENT_DEFAULT))?);
        }
        Ok(Some(timer))
    }

    /// Marks the begin of span `span` at this point of the stream.
    ///
    /// # Errors
    /// [`Error::Limit`] for a span beyond the last, [`Error::DeviceLost`].
    pub(crate) fn begin(&self, ctx: &Context, span: u32) -> Result<()> {
        self.mark(ctx, 2 * span as usize)
    }

    /// Marks the end of span `span` at this point of the stream.
    ///
    /// # Errors
    /// As [`CudaTimer::begin`].
    pub(crate) fn end(&self, ctx: &Context, span: u32) -> Result<()> {
        self.mark(ctx, 2 * span as usize + 1)
    }

    fn mark(&self, ctx: &Context, at: usize) -> Result<()> {
        let op = "timer";
        let (value, limit) = (at as u64 / 2, self.events.len() as u64 / 2);
        let event = *self.events.get(at).ok_or(Error::Limit { op, what: "spans", value, limit })?;
        ctx.bind(op)?;
        // SAFETY: event and stream are of this context.
        ctx.check(op, unsafe { result::event::record(event, ctx.cu_stream()) })
    }

    /// Begins span `span` at this point of the device's stream.
    ///
    /// # Errors
    /// [`Error::Limit`] for a span beyond the last, [`Error::DeviceLost`].
    pub fn start(&self, span: u32) -> Result<()> {
        self.begin(&self.ctx, span)
    }

    /// Ends span `span` at this point of the device's stream.
    ///
    /// # Errors
    /// As [`CudaTimer::start`].
    pub fn stop(&self, span: u32) -> Result<()> {
        self.end(&self.ctx, span)
    }

    /// Nanoseconds of each span, waiting for them; `None` for one that was not marked.
    ///
    /// # Errors
    /// [`Error::DeviceLost`].
    pub fn read_blocking(&self) -> Result<Vec<Option<f64>>> {
        self.ctx.settle("timer")?;
        let span = |pair: &[sys::CUevent]| match *pair {
            // SAFETY: events of this timer; the driver refuses those that were not recorded.
            [begin, end] => unsafe { result::event::elapsed(begin, end) }.ok().map(|ms| f64::from(ms) * 1e6),
            _ => None,
        };
        Ok(self.events.chunks_exact(2).map(span).collect())
    }
}

impl Drop for CudaTimer {
    fn drop(&mut self) {
        if self.ctx.bind_quietly() {
            for &event in &self.events {
                // SAFETY: made once, destroyed once.
                let _ = unsafe { result::event::destroy(event) };
            }
        }
    }
}
