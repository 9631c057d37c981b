//! Steps of RACE, one token of every sequence.

use super::clock::Clock;
use super::counter::{Counter, Part};
use super::outcome::{Outcome, Wrong};
use super::race_layer::{race, window};
use super::race_truth::{self, Truth};
use super::resident::{elements, resident};
use super::step::Step;
#[cfg(feature = "cuda")]
use super::step::{STEPS, replayed};
use softhash::{DType, Device, Race, RaceOptions, RaceState, Tensor};
use std::time::Instant;

/// Steps that are checked.
const CHECKED: u64 = 9;

pub struct Steps {
    race: Race,
    state: RaceState,
    batch: usize,
    counter: Counter,
    planes: usize,
    /// q, k and v of one step.
    inputs: [Tensor; 3],
}

impl Steps {
    pub fn new(
        device: &Device,
        layer: (usize, usize, DType),
        batch: usize,
        hash: (usize, usize),
        window: usize,
    ) -> Outcome<Self> {
        let race = race(device, layer, hash, window)?;
        let (heads, channels, dtype) = layer;
        // Heads of all sequences side by side.
        let counter = Counter { seed: 1, heads: batch * heads, channels, dtype, period: CHECKED };
        let state = race.new_state(batch)?;
        let inputs = inputs(device, &counter, batch, 0)?;
        Ok(Self { race, state, batch, counter, planes: hash.0, inputs })
    }

    /// Takes some steps, and compares what the last gives for the first and the last head with sums in f64.
    pub fn check(&mut self) -> Outcome<()> {
        let device = self.race.device().clone();
        let mut o = None;
        for token in 0..CHECKED {
            self.inputs = inputs(&device, &self.counter, self.batch, token)?;
            let [q, k, v] = self.inputs.each_ref().map(|tensor| tensor.view().unwrap());
            o = Some(self.race.append(&mut self.state, &q, &k, &v)?);
        }
        let o = o.ok_or("no step")?;
        for head in [0, self.counter.heads - 1] {
            let planes = self.race.hyperplanes()?.into_iter().map(f64::from).collect();
            let truth = Truth { counter: self.counter, head, planes, planes_per_table: self.planes, beta: 1.0 };
            let mut truth = truth.at(CHECKED, &[CHECKED - 1], false, |_| ()).remove(0);
            if let Some(window) = window(&self.race) {
                window.mix(&self.counter, head, CHECKED, false, &mut truth);
            }
            let channels = self.counter.channels;
            let found = elements(&device, &o, head * channels..(head + 1) * channels)?;
            let error = race_truth::error(&found.into_iter().map(f64::from).collect::<Vec<_>>(), &truth.o);
            if error >= race_truth::tolerance(self.counter.dtype) {
                return Err(Wrong(format!("a step of RACE is off by {error:.1e} in head {head}")).into());
            }
        }
        Ok(())
    }

    /// Bytes that a step moves at least.
    pub fn bytes(&self) -> u64 {
        self.race.step_bytes(self.batch as u64)
    }

    /// Gives the seconds of one step.
    pub fn step<'a>(&'a mut self, clock: &'a Clock) -> Outcome<Step<'a>> {
        let Self { race, state, inputs, .. } = self;
        let device = race.device().clone();
        let views = || inputs.each_ref().map(|tensor| tensor.view().unwrap());
        // A window is timed full.
        for _ in 0..race.config().window {
            let [q, k, v] = views();
            race.append(state, &q, &k, &v)?;
        }
        #[cfg(feature = "cuda")]
        if device.as_cuda().is_some() {
            let [q, k, v] = views();
            let mut twin = race.fork(state)?;
            let mut expected = Vec::new();
            for _ in 0..STEPS {
                expected.push(race.append(&mut twin, &q, &k, &v)?.read_blocking()?);
            }
            let right = |results: &Vec<Tensor>| -> Outcome<bool> {
                let found = results.iter().map(Tensor::read_blocking).collect::<Result<Vec<_>, _>>()?;
                Ok(found == expected)
            };
            let work = || (0..STEPS).map(|_| race.append(state, &q, &k, &v)).collect();
            return Ok(Step { graph: true, seconds: replayed(&device, work, right, STEPS)? });
        }
        if device.as_wgpu().is_some() {
            let seconds = move || {
                let [q, k, v] = views();
                let options = RaceOptions::default();
                clock.submission(|encoder| race.append_into(encoder, state, &q, &k, &v, &options).map(drop))
            };
            return Ok(Step { graph: false, seconds: Box::new(seconds) });
        }
        let seconds = move || {
            let [q, k, v] = views();
            let start = Instant::now();
            race.append(state, &q, &k, &v)?;
            Ok(start.elapsed().as_secs_f64())
        };
        Ok(Step { graph: false, seconds: Box::new(seconds) })
    }
}

/// `[batch, 1, head, channel]` of one token.
fn inputs(device: &Device, counter: &Counter, batch: usize, token: u64) -> Outcome<[Tensor; 3]> {
    let make = |part| -> Outcome<Tensor> {
        let all = counter.tensor(part, token..token + 1)?.read_blocking()?;
        let shape = [batch, 1, counter.heads / batch, counter.channels];
        let tensor = match counter.dtype {
            DType::Bf16 => Tensor::from_bf16(bytemuck::pod_collect_to_vec(all.bytes()), shape)?,
            _ => Tensor::from_f32(bytemuck::pod_collect_to_vec(all.bytes()), shape)?,
        };
        resident(device, tensor)
    };
    Ok([make(Part::Q)?, make(Part::K)?, make(Part::V)?])
}
