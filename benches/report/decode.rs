//! One query token over caches: dense and sparse.

use super::arguments::Sizes;
use super::figure::{Case, Table};
use super::session::Session;
use super::support::clock::Clock;
use super::support::data::Problem;
use super::support::outcome::Outcome;
use super::support::resident::resident;
use super::support::step::step;
use super::support::{judge, scorings};
use softhash::{DType, DecodeOptions, Mode, SocketCache, Tensor};
use std::ops::Range;
use std::time::Instant;

/// What is measured of one cache after the other; dense attention reads the cache of the first.
const SCORINGS: [&str; 3] = ["sign128", "sign128-group", "socket"];
pub const ALL: [&str; 4] = ["dense", "socket", "sign128", "sign128-group"];

/// Small caches are several that are read in turn, so that the device's own cache does not serve them.
const BYTES_IN_TURN: usize = 512 << 20;
const CACHES: usize = 8;
/// Elements appended at a time.
const CHUNK: usize = 1 << 26;

/// The caches of one scoring.
struct Bank {
    what: &'static str,
    caches: Vec<SocketCache>,
    /// Why it is no longer measured.
    broken: Option<String>,
}

impl Bank {
    /// Caches for `lens`, the last being the longest; as many as their sizes ask for.
    fn new(session: &Session, what: &'static str, problem: &Problem, lens: &[usize]) -> Self {
        let make = |i: usize| -> Outcome<SocketCache> {
            let config = scorings::config(what).ok_or("no such scoring")?;
            let mut cache = SocketCache::new(&session.device, config, problem.shape(), problem.lens.len())?;
            // What is compiled later would be taken for the time that lengths take.
            if session.is_limited() {
                cache.warm_up(DType::Bf16, DType::Bf16)?;
                cache.warm_up(DType::Bf16, DType::F32)?;
            }
            let longest = lens.iter().filter(|&&len| in_turn(session, problem, len) > i).max();
            // Where there is no room for the longest, it grows as far as it can.
            let _ = cache.reserve(longest.copied().unwrap_or(0));
            Ok(cache)
        };
        let count = lens.iter().map(|&len| in_turn(session, problem, len)).max().unwrap_or(1);
        let caches: Outcome<Vec<_>> = (0..count).map(make).collect();
        let broken = caches.as_ref().err().map(ToString::to_string);
        Self { what, caches: caches.unwrap_or_default(), broken }
    }

    fn append(&mut self, sequence: usize, [k, v]: &[Tensor; 2]) {
        let views = || Some((k.view()?, v.view()?));
        for cache in &mut self.caches {
            let Some((k, v)) = views() else { return };
            // Waited for, so that what was uploaded is free again.
            let done = cache.append_to(sequence, &k, &v).and_then(|()| cache.non_finite_seen());
            if let Err(error) = done {
                self.broken = Some(error.to_string());
            }
        }
        if self.broken.is_some() {
            self.caches.clear();
        }
    }
}

fn in_turn(session: &Session, problem: &Problem, len: usize) -> usize {
    let bytes = len * problem.lens.len() * problem.kv_heads * problem.head_dim * 4;
    if session.is_software() { 1 } else { (BYTES_IN_TURN / bytes.max(1)).clamp(1, CACHES) }
}

fn append(
    session: &Session,
    banks: &mut [Bank],
    problem: &Problem,
    sequence: usize,
    tokens: Range<usize>,
) -> Outcome<()> {
    let chunk = (CHUNK / (problem.kv_heads * problem.head_dim)).max(1);
    for start in tokens.clone().step_by(chunk) {
        let [k, v] = problem.keys_values(sequence, start..tokens.end.min(start + chunk))?;
        let pair = [resident(&session.device, k)?, resident(&session.device, v)?];
        banks.iter_mut().filter(|bank| bank.broken.is_none()).for_each(|bank| bank.append(sequence, &pair));
    }
    Ok(())
}

/// Checks and measures one step.
fn measure(session: &mut Session, caches: &mut [SocketCache], problem: &mut Problem, case: Case, mode: Mode) {
    let options = DecodeOptions { mode, ..DecodeOptions::default() };
    let selected = match judge::check(&mut caches[0], problem, &options) {
        Ok(selected) => selected as u64,
        Err(error) => return session.fail(case, &*error),
    };
    let bytes = caches[0].least_bytes((mode == Mode::Sparse).then_some(selected)).total();
    let device = session.device.clone();
    let ready = || -> Outcome<_> { Ok((resident(&device, problem.query_tensor()?)?, Clock::new(&device)?)) };
    match ready() {
        Ok((query, clock)) => {
            let step = step(&device, &clock, caches, &query, options);
            session.measure_step(case, bytes, &clock, step);
        }
        Err(error) => session.fail(case, &*error),
    }
}

/// All scorings over caches that hold what `problem` says.
fn measure_all(
    session: &mut Session,
    banks: &mut [Bank],
    problem: &mut Problem,
    case: &dyn Fn(&Session, &str) -> Case,
) {
    for (i, bank) in banks.iter_mut().enumerate() {
        let whats = if i == 0 { &["dense", bank.what][..] } else { &[bank.what] };
        for &what in whats {
            let case = case(session, what);
            if let Some(why) = &bank.broken {
                session.fail(case, &*Box::<dyn std::error::Error>::from(why.as_str()));
                continue;
            }
            let mode = if what == "dense" { Mode::Dense } else { Mode::Sparse };
            measure(session, &mut bank.caches, problem, case, mode);
        }
    }
}

/// Dense and sparse decoding by length, in caches that grow, in `share` of the time that is left once kernels are compiled.
pub fn by_length(session: &mut Session, share: f64, sizes: &Sizes, problem: &mut Problem) {
    problem.lens = vec![0];
    let lengths = &sizes.lengths;
    let heads = (problem.q_heads, problem.kv_heads);
    let head_dim = problem.head_dim;
    let case = |session: &Session, what: &str, keys: usize| Case {
        heads,
        head_dim,
        tokens: keys as u64,
        ..session.case(Table::Decode, what, "decode")
    };
    if session.is_over() {
        let cases = lengths.iter().flat_map(|&keys| ALL.map(|what| case(session, what, keys)));
        return cases.collect::<Vec<_>>().into_iter().for_each(|case| session.leave_out(case));
    }
    let mut banks: Vec<Bank> = SCORINGS.iter().map(|what| Bank::new(session, what, problem, lengths)).collect();
    session.take_share(share);
    let (mut held, mut pace) = (0, 0.0);
    for &keys in lengths {
        if !session.has_room(pace * keys as f64) {
            ALL.iter().for_each(|what| session.leave_out(case(session, what, keys)));
            continue;
        }
        let start = Instant::now();
        banks.iter_mut().for_each(|bank| bank.caches.truncate(in_turn(session, problem, keys)));
        if let Err(error) = append(session, &mut banks, problem, 0, held..keys) {
            ALL.iter().for_each(|what| session.fail(case(session, what, keys), &*error));
            return;
        }
        (held, problem.lens) = (keys, vec![keys]);
        measure_all(session, &mut banks, problem, &|session, what| case(session, what, keys));
        pace = start.elapsed().as_secs_f64() / keys as f64;
    }
}

/// Dense and sparse decoding of one problem, filled at once.
pub fn whole(session: &mut Session, table: Table, problem: &mut Problem) {
    let (heads, head_dim, batch) = ((problem.q_heads, problem.kv_heads), problem.head_dim, problem.lens.len());
    let tokens = problem.keys() as u64;
    let case =
        |session: &Session, what: &str| Case { heads, head_dim, batch, tokens, ..session.case(table, what, "decode") };
    if session.is_over() {
        return ALL.iter().for_each(|what| session.leave_out(case(session, what)));
    }
    let lens = problem.lens.clone();
    let longest = [problem.keys()];
    let mut banks: Vec<Bank> = SCORINGS.iter().map(|what| Bank::new(session, what, problem, &longest)).collect();
    for (sequence, &len) in lens.iter().enumerate() {
        if let Err(error) = append(session, &mut banks, problem, sequence, 0..len) {
            return ALL.iter().for_each(|what| session.fail(case(session, what), &*error));
        }
    }
    measure_all(session, &mut banks, problem, &case);
}
