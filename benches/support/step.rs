//! One decode step as a host would run it: in a graph on CUDA, in one submission through wgpu, as a call on the CPU.

use super::clock::Clock;
use super::outcome::Outcome;
use softhash::{Attended, DecodeOptions, Device, SocketCache, Tensor};
use std::time::Instant;

/// Gives the seconds of one step. The caches hold the same and are read in turn, so that those that
/// are large together are not served by a device's own cache.
pub struct Step<'a> {
    /// Whether it is one of a replayed graph.
    pub graph: bool,
    pub seconds: Box<dyn FnMut() -> Outcome<f64> + 'a>,
}

pub fn step<'a>(
    device: &Device,
    clock: &'a Clock,
    caches: &'a mut [SocketCache],
    query: &'a Tensor,
    options: DecodeOptions,
) -> Outcome<Step<'a>> {
    #[cfg(feature = "cuda")]
    if device.as_cuda().is_some() {
        let steps = caches.len().max(STEPS);
        let view = query.view().ok_or("no view of the query")?;
        let expected = caches[0].decode_with(&view, &options)?.o.read_blocking()?;
        for cache in &mut *caches {
            cache.decode_with(&view, &options)?;
        }
        let count = caches.len();
        let all = || (0..steps).map(|i| caches[i % count].decode_with(&view, &options)).collect();
        let right = |results: &Vec<Attended>| -> Outcome<bool> {
            let mut right = true;
            for result in results {
                right &= result.o.read_blocking()? == expected;
            }
            Ok(right)
        };
        return Ok(Step { graph: true, seconds: replayed(device, all, right, steps)? });
    }
    let mut turn = 0;
    if device.as_wgpu().is_some() {
        let seconds = move || {
            let view = query.view().ok_or("no view of the query")?;
            turn = (turn + 1) % caches.len();
            clock.submission(|encoder| caches[turn].decode_into(encoder, &view, &options).map(drop))
        };
        return Ok(Step { graph: false, seconds: Box::new(seconds) });
    }
    let seconds = move || {
        let view = query.view().ok_or("no view of the query")?;
        turn = (turn + 1) % caches.len();
        wall(&mut caches[turn], &view, &options)
    };
    Ok(Step { graph: false, seconds: Box::new(seconds) })
}

/// Seconds of one decode from call to readable result.
pub fn wall(cache: &mut SocketCache, query: &softhash::TensorView<'_>, options: &DecodeOptions) -> Outcome<f64> {
    let start = Instant::now();
    let Attended { lse, .. } = cache.decode_with(query, options)?;
    lse.read_blocking()?;
    Ok(start.elapsed().as_secs_f64())
}

/// Steps of a graph at least: between two launches there is a gap that a model, whose layers are one graph, has not.
#[cfg(feature = "cuda")]
pub const STEPS: usize = 4;

/// Captures `work`, which is `steps` steps and has been run before, and gives the seconds of one replayed step. Its
/// results must be `right`.
#[cfg(feature = "cuda")]
pub fn replayed<T: 'static>(
    device: &Device,
    work: impl FnOnce() -> softhash::Result<T>,
    right: impl FnOnce(&T) -> Outcome<bool>,
    steps: usize,
) -> Outcome<Box<dyn FnMut() -> Outcome<f64> + 'static>> {
    let timer = device.cuda_timer(1)?.ok_or("the driver is too old for its clock")?;
    let (mut graph, results) = device.capture(work)?;
    graph.launch()?;
    if !right(&results)? {
        return Err(Box::new(super::outcome::Wrong("a replayed step gives another result".into())));
    }
    let mut seconds = move |launches: usize| {
        // Held for as long as the graph writes them.
        let _ = &results;
        let all = super::cuda::seconds(&timer, || (0..launches).for_each(|_| graph.launch().unwrap()));
        all / (launches * steps) as f64
    };
    seconds(1);
    // The clock's tick is half a microsecond.
    let launches = (2e-3 / (seconds(1) * steps as f64)).clamp(1.0, 20.0) as usize;
    Ok(Box::new(move || Ok(seconds(launches))))
}
