//! Bits per byte of one window of text under several ways of attending.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use softhash::{DType, Device, Mode, SocketCache};

use crate::Result;
use crate::model::{Attention, KeyValues, Model};
use crate::selector::Selector;

/// How a window is run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Tokens in the cache at the end of a window.
    pub context: usize,
    /// Last positions of them, decoded and scored.
    pub scored: usize,
    /// Tokens per pass over the prompt.
    pub prefill_chunk: usize,
    /// Tokens per pass over the scored positions. Each sees only the keys up to its own position, so the result is
    /// that of single steps.
    pub decode_chunk: usize,
    /// Element type of the caches.
    pub dtype: DType,
}

/// What one selector did.
#[derive(Clone, Debug, Default)]
pub struct Score {
    /// Sum of −log₂ p over the scored positions.
    pub bits: f64,
    /// Time of the prompt's pass; dense only, the others take over its keys and values.
    pub prefill: Duration,
    /// Time of the scored positions.
    pub decode: Duration,
}

impl Plan {
    fn prompt(&self) -> usize {
        self.context - self.scored
    }

    /// Progress steps of one window: layers times tokens.
    pub fn work(&self, layers: usize, selectors: usize) -> u64 {
        ((self.prompt() + self.scored * selectors) * layers) as u64
    }
}

fn caches(device: &Device, model: &Model, selector: &Selector, plan: &Plan) -> Result<Vec<SocketCache>> {
    let new = |_| {
        let mut cache = SocketCache::new(device, selector.config.clone(), model.cache_shape(plan.dtype), 1)?;
        cache.reserve(plan.context)?;
        Ok(cache)
    };
    (0..model.config.layers).map(new).collect()
}

/// Scores one window of `context + 1` ids under `dense` and every one of `others`; dense comes first in the result.
///
/// The prompt is run once, exactly. Every selector starts from the same keys and values of it.
pub fn window(
    device: &Device,
    model: &Model,
    plan: &Plan,
    (dense, others): (&Selector, &[Selector]),
    ids: &[u32],
    bar: &ProgressBar,
) -> Result<Vec<Score>> {
    let mut prompt = (0..model.config.layers).map(|_| KeyValues::new(plan.dtype)).collect::<Result<Vec<_>>>()?;
    let mut dense_caches = caches(device, model, dense, plan)?;
    bar.set_message("prompt");
    let start = Instant::now();
    for chunk in ids[..plan.prompt()].chunks(plan.prefill_chunk) {
        let step = || bar.inc(chunk.len() as u64);
        model.forward(chunk, &mut dense_caches, Attention::Prefill, false, Some(&mut prompt), step)?;
    }
    let prefill = start.elapsed();
    bar.set_message(dense.name.clone());
    let score = decode(model, plan, dense.mode, &mut dense_caches, ids, bar)?;
    let mut scores = vec![Score { prefill, ..score }];
    drop(dense_caches);

    for selector in others {
        bar.set_message(selector.name.clone());
        let mut caches = caches(device, model, selector, plan)?;
        for (cache, kept) in caches.iter_mut().zip(&prompt) {
            kept.append_to(cache, 0..plan.prompt())?;
        }
        scores.push(decode(model, plan, selector.mode, &mut caches, ids, bar)?);
    }
    Ok(scores)
}

/// Decodes the scored positions behind a cached prompt, teacher-forced.
fn decode(
    model: &Model,
    plan: &Plan,
    mode: Mode,
    caches: &mut [SocketCache],
    ids: &[u32],
    bar: &ProgressBar,
) -> Result<Score> {
    let (inputs, targets) = (&ids[plan.prompt()..plan.context], &ids[plan.prompt() + 1..plan.context + 1]);
    let start = Instant::now();
    let mut bits = 0.0;
    for (inputs, targets) in inputs.chunks(plan.decode_chunk).zip(targets.chunks(plan.decode_chunk)) {
        let step = || bar.inc(inputs.len() as u64);
        let hidden = model.forward(inputs, caches, Attention::Decode(mode), true, None, step)?;
        bits += model.surprise(&hidden, targets)?.iter().sum::<f64>();
    }
    Ok(Score { bits, prefill: Duration::ZERO, decode: start.elapsed() })
}
