//! Times of the stages of one call, taken only where somebody asks.

use crate::socket::executor::StageTime;
use std::time::Instant;

/// A stopwatch, at rest unless it is started.
#[derive(Default)]
pub(crate) struct Laps {
    last: Option<Instant>,
    stages: Vec<StageTime>,
}

impl Laps {
    #[cfg(not(target_arch = "wasm32"))]
    pub fn start(&mut self) {
        *self = Self { last: Some(Instant::now()), stages: Vec::new() };
    }

    /// What passed since the last lap was `stage`; the times of one stage add up.
    pub fn lap(&mut self, stage: &'static str) {
        let Some(last) = &mut self.last else { return };
        let now = Instant::now();
        let nanoseconds = (now - std::mem::replace(last, now)).as_secs_f64() * 1e9;
        match self.stages.iter_mut().find(|s| s.stage == stage) {
            Some(known) => known.nanoseconds += nanoseconds,
            None => self.stages.push(StageTime { stage, nanoseconds }),
        }
    }

    #[cfg(not(target_arch = "wasm32"))]
    pub fn stop(&mut self) -> Vec<StageTime> {
        std::mem::take(self).stages
    }
}
