//! RACE forward, backward and by the step.

use super::arguments::Sizes;
use super::figure::{Case, Table};
use super::session::Session;
use super::support::clock::Clock;
use super::support::outcome::Outcome;
use super::support::race_layer::{Layer, Size, Tensors, Truths, race};
use super::support::race_step::Steps;
use softhash::DType;
use std::time::Instant;

const STAGES: [&str; 2] = ["forward", "backward"];

/// Tokens of a call at most: what a buffer holds through wgpu; on CUDA as many as fit into memory with all results.
fn segment(session: &Session, heads: usize, channels: usize, dtype: DType) -> u64 {
    #[cfg(feature = "cuda")]
    if let Some(cuda) = session.device.report().cuda {
        // q, k, v, o and the gradient of o, and three gradients in f32.
        let token = (heads * channels * (5 * dtype.size() + 12)) as u64;
        let fitting = cuda.memory / 5 * 4 / token;
        return 1 << fitting.clamp(1 << 16, 1 << 22).ilog2();
    }
    let _ = (heads, channels, dtype);
    if session.is_software() { 1 << 16 } else { 1 << 18 }
}

/// The element type and the name that figures go by.
fn dtype(name: &str) -> Option<(DType, &'static str)> {
    match name {
        "bf16" => Some((DType::Bf16, "bf16")),
        "f32" => Some((DType::F32, "f32")),
        _ => None,
    }
}

/// Forward and backward by length.
pub fn by_length(session: &mut Session, sizes: &Sizes, truths: &mut Truths) {
    let (heads, channels) = (sizes.race_heads, sizes.head_dim);
    // What is compiled later would be taken for the time that lengths take; what fails fails again.
    for (dtype, _) in sizes.dtypes.iter().filter(|_| session.is_limited()).filter_map(|name| dtype(name)) {
        sizes.hashes.iter().take_while(|_| !session.is_over()).for_each(|&hash| {
            let _ = race(&session.device, (heads, channels, dtype), hash, 0);
        });
    }
    session.take_share(1.0);
    let mut pace = 0.0;
    for &tokens in &sizes.tokens {
        for (dtype, name) in sizes.dtypes.iter().filter_map(|name| dtype(name)) {
            let start = Instant::now();
            let segment = segment(session, heads, channels, dtype);
            let size = Size { tokens, segment, heads, channels, dtype };
            let case = |session: &Session, (planes, tables): (usize, usize), stage| Case {
                heads: (heads, heads),
                head_dim: channels,
                dtype: name,
                tokens,
                ..session.case(Table::Race, &format!("P{planes} L{tables}"), stage)
            };
            let cases = |session: &Session, hash| STAGES.map(|stage| case(session, hash, stage));
            let mut tensors = None;
            for (i, &hash) in sizes.hashes.iter().enumerate() {
                let cases = cases(session, hash);
                if !session.has_room(pace * tokens as f64) {
                    cases.into_iter().for_each(|case| session.leave_out(case));
                    continue;
                }
                let begin = Instant::now();
                if tensors.is_none() {
                    tensors = Some(Tensors::new(&session.device, size));
                }
                match &tensors {
                    Some(Ok(tensors)) => layer(session, tensors, truths, hash, cases),
                    Some(Err(error)) => cases.into_iter().for_each(|case| session.fail(case, &**error)),
                    None => (),
                }
                // With the first go the tensors.
                let since = if i == 0 { start } else { begin };
                pace = since.elapsed().as_secs_f64() / tokens as f64;
            }
        }
    }
}

fn layer(session: &mut Session, tensors: &Tensors, truths: &mut Truths, hash: (usize, usize), cases: [Case; 2]) {
    let mut ready = || -> Outcome<Layer<'_>> {
        let mut layer = Layer::new(&session.device, tensors, hash, 0)?;
        layer.check(truths, true)?;
        Ok(layer)
    };
    let mut layer = match ready() {
        Ok(layer) => layer,
        Err(error) => return cases.into_iter().for_each(|case| session.fail(case, &*error)),
    };
    let [forward, backward] = cases;
    let calls = tensors.size.tokens.div_ceil(tensors.size.segment);
    let bytes = [layer.bytes(false), layer.bytes(true)];
    session.measure(forward, bytes[0], calls, |clock| clock.once(|| layer.forward(|_, _| Ok(()))));
    session.measure(backward, bytes[1], calls, |clock| clock.once(|| layer.backward(|_, _| Ok(()))));
}

/// One token of every sequence.
pub fn steps(session: &mut Session, sizes: &Sizes) {
    for &(heads, batch) in &sizes.steps {
        for &(planes, tables) in &sizes.step_hashes {
            let case = Case {
                heads: (heads, heads),
                head_dim: sizes.head_dim,
                batch,
                tokens: 1,
                ..session.case(Table::RaceStep, &format!("P{planes} L{tables}"), "step")
            };
            if session.is_over() {
                session.leave_out(case);
                continue;
            }
            let ready = || -> Outcome<(Steps, Clock)> {
                let shape = (heads, sizes.head_dim, DType::Bf16);
                let mut steps = Steps::new(&session.device, shape, batch, (planes, tables), 0)?;
                steps.check()?;
                Ok((steps, Clock::new(&session.device)?))
            };
            match ready() {
                Ok((mut steps, clock)) => {
                    let bytes = steps.bytes();
                    session.measure_step(case, bytes, &clock, steps.step(&clock));
                }
                Err(error) => session.fail(case, &*error),
            }
        }
    }
}
