//! Times on the device's own clock where it has one.

#[cfg(feature = "cuda")]
use super::cuda;
use super::outcome::Outcome;
use softhash::{Device, Timer, wgpu};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::time::Instant;

pub struct Clock {
    device: Device,
    timer: Option<Timer>,
    #[cfg(feature = "cuda")]
    cuda: Option<softhash::CudaTimer>,
    /// Whether its own clock gave no time once.
    failed: Cell<bool>,
    /// While it settles: the last submissions, which nobody waits for.
    settling: RefCell<Option<VecDeque<wgpu::SubmissionIndex>>>,
}

/// Submissions that may be under way while a clock settles: a GPU that gets them one at a time does not raise its clocks.
const AHEAD: usize = 8;

/// The timestamps of a wgpu device. Those of lavapipe do not wait for the threads that do the work.
pub fn timer(device: &Device) -> softhash::Result<Option<Timer>> {
    if device.report().gpu.is_some_and(|gpu| gpu.software) { Ok(None) } else { device.timer(1) }
}

impl Clock {
    pub fn new(device: &Device) -> Outcome<Self> {
        Ok(Self {
            device: device.clone(),
            timer: timer(device)?,
            #[cfg(feature = "cuda")]
            cuda: device.cuda_timer(1)?,
            failed: Cell::new(false),
            settling: RefCell::default(),
        })
    }

    /// `gpu` or `wall`, whose times those so far were.
    pub fn name(&self) -> &'static str {
        let own = self.timer.is_some();
        #[cfg(feature = "cuda")]
        let own = own || self.cuda.is_some();
        if own && !self.failed.get() { "gpu" } else { "wall" }
    }

    fn submit(&self, record: impl FnOnce(&Timer, &mut wgpu::CommandEncoder)) {
        if let (Some((gpu, queue)), Some(timer)) = (self.device.as_wgpu(), &self.timer) {
            let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
            record(timer, &mut encoder);
            queue.submit([encoder.finish()]);
        }
    }

    /// Seconds of one run from its first command to its last, so that a GPU that waits for the host shows.
    pub fn once(&self, mut run: impl FnMut() -> Outcome<()>) -> Outcome<f64> {
        #[cfg(feature = "cuda")]
        if let Some(timer) = &self.cuda {
            let mut result = Ok(());
            let seconds = cuda::seconds(timer, || result = run());
            return result.map(|()| seconds);
        }
        self.wait();
        self.submit(|timer, encoder| timer.begin(encoder, 0));
        let start = Instant::now();
        run()?;
        self.submit(|timer, encoder| {
            timer.end(encoder, 0);
            timer.resolve(encoder);
        });
        self.wait();
        Ok(self.own_or(start.elapsed().as_secs_f64()))
    }

    /// As [`Clock::once`] of what is left in one submission.
    pub fn submission<E: Into<Box<dyn std::error::Error>>>(
        &self,
        record: impl FnOnce(&mut wgpu::CommandEncoder) -> Result<(), E>,
    ) -> Outcome<f64> {
        let (gpu, queue) = self.device.as_wgpu().ok_or("no GPU to submit to")?;
        let mut encoder = gpu.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        if let Some(ahead) = &mut *self.settling.borrow_mut() {
            record(&mut encoder).map_err(Into::into)?;
            ahead.push_back(queue.submit([encoder.finish()]));
            if ahead.len() > AHEAD {
                let submission_index = ahead.pop_front();
                gpu.poll(wgpu::PollType::Wait { submission_index, timeout: None })?;
            }
            return Ok(0.0);
        }
        if let Some(timer) = &self.timer {
            timer.begin(&mut encoder, 0);
        }
        record(&mut encoder).map_err(Into::into)?;
        if let Some(timer) = &self.timer {
            timer.end(&mut encoder, 0);
            timer.resolve(&mut encoder);
        }
        let start = Instant::now();
        queue.submit([encoder.finish()]);
        self.wait();
        Ok(self.own_or(start.elapsed().as_secs_f64()))
    }

    /// Makes runs that are one submission follow each other without waiting, and without a time; or ends that.
    fn settle(&self, on: bool) {
        self.wait();
        self.settling.replace(on.then(VecDeque::new));
    }

    fn own_or(&self, wall: f64) -> f64 {
        let own = self.timer.as_ref().and_then(|timer| timer.read_blocking().ok()?[0]);
        self.failed.set(self.failed.get() || own.is_none());
        own.map_or(wall, |nanoseconds| nanoseconds * 1e-9)
    }

    fn wait(&self) {
        if let Some((gpu, _)) = self.device.as_wgpu() {
            let _ = gpu.poll(wgpu::PollType::wait_indefinitely());
        }
    }
}

/// How long to measure one figure.
#[derive(Clone, Copy)]
pub struct Patience {
    /// Seconds of runs that are not counted, one run at least: a GPU that had nothing to do has lowered its clocks.
    pub settling: f64,
    pub seconds: f64,
    /// Samples taken even if they take longer, unless they take ten times as long.
    pub least: usize,
}

/// Seconds after which a GPU's clocks are up.
const SETTLING: f64 = 0.25;

impl Patience {
    pub fn new(device: &Device, seconds: f64) -> Self {
        let software = device.is_cpu() || device.report().gpu.is_some_and(|gpu| gpu.software);
        Self { settling: if software { 0.0 } else { SETTLING }, seconds, least: 3 }
    }
}

/// Runs uncounted, one after the other without waiting, until a GPU's clocks are up.
pub fn raise_clocks(patience: Patience, clock: &Clock, mut run: impl FnMut() -> Outcome<f64>) -> Outcome<()> {
    let start = Instant::now();
    clock.settle(true);
    let settled = loop {
        let passed = run();
        if passed.is_err() || start.elapsed().as_secs_f64() >= patience.settling {
            break passed;
        }
    };
    clock.settle(false);
    settled.map(drop)
}

/// Runs uncounted, then counted by `clock`, as `patience` has it. While a driver still clears memory that was given back,
/// runs that read much take several times as long: such samples are taken again.
pub fn samples(patience: Patience, clock: &Clock, mut run: impl FnMut() -> Outcome<f64>) -> Outcome<Vec<f64>> {
    const TRIES: usize = 4;
    let mut counted = Vec::new();
    for _ in 0..TRIES {
        raise_clocks(patience, clock, &mut run)?;
        counted = count(patience, &mut run)?;
        if patience.settling == 0.0 || is_steady(&counted) {
            break;
        }
    }
    Ok(counted)
}

/// Whether half of the samples are near the least of them.
fn is_steady(samples: &[f64]) -> bool {
    let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
    let near = samples.iter().filter(|&&sample| sample <= 1.5 * least).count();
    2 * near >= samples.len()
}

fn count(patience: Patience, mut run: impl FnMut() -> Outcome<f64>) -> Outcome<Vec<f64>> {
    let (mut samples, start) = (Vec::new(), Instant::now());
    let enough = |count: usize| {
        let passed = start.elapsed().as_secs_f64() / patience.seconds;
        count >= 1000 || (count >= patience.least && passed > 1.0) || (count >= 1 && passed > 10.0)
    };
    while !enough(samples.len()) {
        samples.push(run()?);
    }
    Ok(samples)
}
