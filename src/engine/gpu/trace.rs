//! Times of stages, summed up over calls, for benches.

use super::context::Context;
use super::passes::Ready;
#[cfg(not(target_arch = "wasm32"))]
use super::timing::Timer;
use crate::engine::lock;
use crate::error::Result;
use std::collections::BTreeMap;
use std::sync::Mutex;

/// Dispatches and nanoseconds of a stage.
pub(crate) type Stages = BTreeMap<&'static str, (u64, f64)>;

/// What has been timed since tracing began, if it has.
#[derive(Debug, Default)]
pub(crate) struct Trace(Mutex<Option<Stages>>);

impl Trace {
    /// Begins, or ends and hands out what was timed.
    pub fn set(&self, on: bool) -> Stages {
        std::mem::replace(&mut *lock(&self.0), on.then(Stages::new)).unwrap_or_default()
    }

    /// Runs a list with a pass per dispatch, waits for it and adds its times; `false`, and nothing is done, without a
    /// trace or timestamps.
    #[cfg(not(target_arch = "wasm32"))]
    pub(super) fn run(&self, ctx: &std::sync::Arc<Context>, op: &'static str, ready: &Ready) -> Result<bool> {
        if lock(&self.0).is_none() {
            return Ok(false);
        }
        let stages = ready.stages();
        if stages.is_empty() {
            return Ok(false);
        }
        let Some(timer) = Timer::new(ctx, stages.len() as u32)? else { return Ok(false) };
        let mut encoder = ctx.encoder(op);
        ready.record(&mut encoder, Some(&timer));
        timer.resolve(&mut encoder);
        ctx.submit(op, encoder)?;
        let times = timer.read_blocking()?;
        if let Some(sums) = &mut *lock(&self.0) {
            for (stage, time) in stages.into_iter().zip(times) {
                let (count, sum) = sums.entry(stage).or_default();
                *count += 1;
                *sum += time.unwrap_or(f64::NAN);
            }
        }
        Ok(true)
    }

    #[cfg(target_arch = "wasm32")]
    pub(super) fn run(&self, _: &std::sync::Arc<Context>, _: &'static str, _: &Ready) -> Result<bool> {
        Ok(false)
    }
}
