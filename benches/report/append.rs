//! Taking in a prompt, and one token.

use super::arguments::Sizes;
use super::figure::{Case, Table};
use super::session::Session;
use super::support::clock::Clock;
use super::support::data::Problem;
use super::support::outcome::Outcome;
use super::support::resident::resident;
use super::support::step::Step;
#[cfg(feature = "cuda")]
use super::support::step::replayed;
use super::support::{judge, scorings};
use softhash::{DecodeOptions, SocketCache, Tensor};

/// Tokens of one call.
const CALL: usize = 1 << 16;
/// Room for tokens appended one by one.
const SPARE: usize = 1 << 13;

pub const SCORINGS: [&str; 2] = ["socket", "sign128"];

pub fn all(session: &mut Session, sizes: &Sizes) {
    let (q, kv) = sizes.heads[0];
    let mut problem = Problem::new(q, kv, sizes.head_dim, sizes.append);
    for what in SCORINGS {
        let case = |session: &Session, tokens: usize| Case {
            heads: (q, kv),
            head_dim: sizes.head_dim,
            tokens: tokens as u64,
            ..session.case(Table::Append, what, "append")
        };
        let cases = [case(session, sizes.append), case(session, 1)];
        if session.is_over() {
            cases.into_iter().for_each(|case| session.leave_out(case));
        } else if let Err(error) = one(session, &mut problem, what, cases.clone()) {
            cases.into_iter().for_each(|case| session.fail(case, &*error));
        }
    }
}

/// Measures both, or neither where it fails.
fn one(session: &mut Session, problem: &mut Problem, what: &str, [prompt, token]: [Case; 2]) -> Outcome<()> {
    let device = session.device.clone();
    let keys = problem.keys();
    let mut cache = SocketCache::new(&device, scorings::config(what).ok_or("no such scoring")?, problem.shape(), 1)?;
    cache.reserve(keys + SPARE)?;
    let mut pieces = Vec::new();
    for start in (0..keys).step_by(CALL) {
        let [k, v] = problem.keys_values(0, start..keys.min(start + CALL))?;
        pieces.push([resident(&device, k)?, resident(&device, v)?]);
    }
    take_in(&mut cache, &pieces)?;
    judge::check(&mut cache, problem, &DecodeOptions::default())?;
    let (bytes, calls) = (cache.append_bytes(keys as u64), pieces.len() as u64);
    session.measure(prompt, bytes, calls, |clock| {
        cache.reset()?;
        clock.once(|| take_in(&mut cache, &pieces))
    });
    let [k, v] = problem.keys_values(0, keys - 1..keys)?;
    let next = [resident(&device, k)?, resident(&device, v)?];
    // The last key again, alone.
    cache.truncate(0, keys - 1)?;
    take_in(&mut cache, std::slice::from_ref(&next))?;
    judge::check(&mut cache, problem, &DecodeOptions::default())?;
    let (bytes, clock) = (cache.append_bytes(1), Clock::new(&device)?);
    let step = step(session, &clock, &mut cache, &next);
    session.measure_step(token, bytes, &clock, step);
    Ok(())
}

fn take_in(cache: &mut SocketCache, pieces: &[[Tensor; 2]]) -> Outcome<()> {
    for [k, v] in pieces {
        let (k, v) = (k.view().ok_or("no view")?, v.view().ok_or("no view")?);
        cache.append(&k, &v)?;
    }
    Ok(())
}

/// Appends of one token.
fn step<'a>(
    session: &Session,
    clock: &'a Clock,
    cache: &'a mut SocketCache,
    next: &'a [Tensor; 2],
) -> Outcome<Step<'a>> {
    let [k, v] = next;
    #[cfg(feature = "cuda")]
    if session.device.as_cuda().is_some() {
        use super::support::step::STEPS;
        let (k, v) = (k.view().ok_or("no view")?, v.view().ok_or("no view")?);
        cache.append(&k, &v)?;
        let work = || (0..STEPS).try_for_each(|_| cache.append(&k, &v));
        return Ok(Step { graph: true, seconds: replayed(&session.device, work, |()| Ok(true), STEPS)? });
    }
    let on_gpu = session.device.as_wgpu().is_some();
    let mut appended = 0;
    let seconds = move || {
        // As many as there is room for.
        appended += 1;
        if appended >= SPARE / 2 {
            let held = cache.len(0).unwrap_or(0);
            cache.truncate(0, held + 1 - appended)?;
            appended = 1;
        }
        let (k, v) = (k.view().ok_or("no view")?, v.view().ok_or("no view")?);
        if on_gpu {
            return clock.submission(|encoder| cache.append_into(encoder, &k, &v, &[1]));
        }
        let start = std::time::Instant::now();
        cache.append(&k, &v)?;
        Ok(start.elapsed().as_secs_f64())
    };
    Ok(Step { graph: false, seconds: Box::new(seconds) })
}
