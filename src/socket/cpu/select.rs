//! Exact selection of the best keys without a sort: a threshold guessed from a sample leaves few candidates.

use crate::engine::cpu::simd::{Kernel, Lanes, Level};
use crate::socket::config::Rule;
use std::ops::Range;

/// Below so many candidates all of them are ranked.
const SMALL: usize = 2048;
/// Every so many-th score is sampled; a prime, so that periodic scores are met in all phases.
const SAMPLE: usize = 61;

/// Scores of the keys of one selection, in pages of `page_tokens`.
pub(crate) struct Scores<'a> {
    pub pages: Vec<&'a [f32]>,
    pub page_tokens: usize,
}

impl Scores<'_> {
    pub fn get(&self, key: usize) -> f32 {
        self.pages[key / self.page_tokens][key % self.page_tokens]
    }

    /// Slices that cover `range`, each with the index of its first key.
    fn slices(&self, range: Range<usize>) -> impl Iterator<Item = (usize, &[f32])> {
        let first = range.start / self.page_tokens;
        self.pages.iter().enumerate().skip(first).map_while(move |(i, page)| {
            let start = i * self.page_tokens;
            let (from, to) = (range.start.max(start), range.end.min(start + self.page_tokens));
            (from < to).then(|| (from, &page[from - start..to - start]))
        })
    }
}

/// Order-preserving integer of a score: NaN lowest, the two zeros equal.
fn order(score: f32) -> u32 {
    if score.is_nan() {
        return 0;
    }
    let bits = (score + 0.0).to_bits();
    if bits >> 31 == 0 { bits | 1 << 31 } else { !bits }
}

/// One number that ranks by score, then by lower index.
fn rank(score: f32, index: usize) -> u64 {
    u64::from(order(score)) << 32 | u64::from(!(index as u32))
}

/// The `count` best keys of `range`, ascending.
fn best(scores: &Scores<'_>, range: Range<usize>, count: usize) -> Vec<u32> {
    if count >= range.len() {
        return range.map(|i| i as u32).collect();
    }
    if count == 0 {
        return Vec::new();
    }
    let mut ranked = guess(scores, &range, count)
        .map(|threshold| Level::best().run(Collect { scores, range: range.clone(), threshold, room: 2 * count }))
        .unwrap_or_default();
    if ranked.len() < count {
        ranked = scores
            .slices(range)
            .flat_map(|(first, s)| s.iter().enumerate().map(move |(i, s)| rank(*s, first + i)))
            .collect();
    }
    let mut order = ranked.clone();
    let (_, &mut last, _) = order.select_nth_unstable_by(count - 1, |a, b| b.cmp(a));
    ranked.into_iter().filter(|r| *r >= last).map(|r| !(r as u32)).collect()
}

/// A score that very likely lies a little below the `count`-th best.
fn guess(scores: &Scores<'_>, range: &Range<usize>, count: usize) -> Option<f32> {
    if range.len() < SMALL {
        return None;
    }
    let slices = scores.slices(range.clone());
    let phase = |first: usize| (SAMPLE - (first - range.start) % SAMPLE) % SAMPLE;
    let mut sample = Vec::with_capacity(range.len() / SAMPLE + 1);
    slices.for_each(|(first, s)| sample.extend(s.iter().skip(phase(first)).step_by(SAMPLE)));
    let expected = count as f64 / SAMPLE as f64;
    let place = (expected + 4.0 * expected.sqrt() + 8.0) as usize;
    if place >= sample.len() {
        return None;
    }
    let (_, &mut threshold, _) = sample.select_nth_unstable_by(place, |a, b| order(*b).cmp(&order(*a)));
    (!threshold.is_nan()).then_some(threshold)
}

/// Ranks of the keys whose score reaches the threshold, in the order of the keys.
struct Collect<'a> {
    scores: &'a Scores<'a>,
    range: Range<usize>,
    threshold: f32,
    room: usize,
}

impl Kernel for Collect<'_> {
    type Output = Vec<u64>;

    #[inline(always)]
    fn run<S: Lanes>(self, simd: S) -> Vec<u64> {
        let mut out = Vec::with_capacity(self.room);
        let threshold = simd.splat_f32s(self.threshold);
        for (first, scores) in self.scores.slices(self.range.clone()) {
            let whole = scores.len() - scores.len() % S::F32_LANES;
            for i in (0..whole).step_by(S::F32_LANES) {
                let mut hits = simd.at_least(simd.load(&scores[i..]), threshold);
                while hits != 0 {
                    let at = i + hits.trailing_zeros() as usize;
                    out.push(rank(scores[at], first + at));
                    hits &= hits - 1;
                }
            }
            for (i, score) in scores.iter().enumerate().skip(whole) {
                if *score >= self.threshold {
                    out.push(rank(*score, first + i));
                }
            }
        }
        out
    }
}

/// The keys that a query with `visible` keys attends, ascending (spec §3). `sink + window + heavy < visible`.
pub(crate) fn select(scores: &Scores<'_>, rule: Rule, [sink, window, heavy]: [usize; 3], visible: usize) -> Vec<u32> {
    let middle = sink.min(visible)..visible.saturating_sub(window).max(sink.min(visible));
    let chosen = match rule {
        Rule::Disjoint => best(scores, middle.clone(), heavy),
        Rule::Union => best(scores, 0..visible, heavy),
    };
    let base = |range: Range<usize>| range.map(|i| i as u32);
    let inside = |i: &u32| middle.contains(&(*i as usize));
    base(0..middle.start).chain(chosen.into_iter().filter(inside)).chain(base(middle.end..visible)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(scores: &[f32], rule: Rule, [sink, window, heavy]: [usize; 3]) -> Vec<u32> {
        let n = scores.len();
        let base = |i: &usize| *i < sink || *i >= n - window;
        let mut order: Vec<usize> = (0..n).filter(|i| rule == Rule::Union || !base(i)).collect();
        let value = |i: usize| if scores[i].is_nan() { (0, 0.0) } else { (1, scores[i]) };
        order.sort_by(|a, b| value(*b).partial_cmp(&value(*a)).unwrap_or(std::cmp::Ordering::Equal).then(a.cmp(b)));
        let mut all: Vec<usize> = order.into_iter().take(heavy).chain((0..n).filter(base)).collect();
        all.sort_unstable();
        all.dedup();
        all.into_iter().map(|i| i as u32).collect()
    }

    #[test]
    fn equals_a_full_sort() {
        let mut state = 1u64;
        let mut random = move || {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 40) as u32
        };
        for n in [40, 100, 2047, 2048, 5000, 20_000] {
            for kind in 0..6 {
                let scores: Vec<f32> = (0..n)
                    .map(|i| match kind {
                        0 => random() as f32 - 8e6,
                        1 => (random() % 5) as f32 - 2.0,
                        2 => 1.0,
                        3 if random() % 3 == 0 => f32::NAN,
                        3 => (random() % 100) as f32 * if random() % 2 == 0 { -0.0 } else { 0.5 },
                        4 => {
                            if i % SAMPLE == 0 {
                                1e9
                            } else {
                                random() as f32
                            }
                        }
                        _ => f32::NAN,
                    })
                    .collect();
                for page in [64, 1024] {
                    let view = Scores { pages: scores.chunks(page).collect(), page_tokens: page };
                    for part in [[0, 0, 1], [3, 5, 7], [4, 0, n / 33 + 1], [0, 9, n / 2]] {
                        for rule in [Rule::Disjoint, Rule::Union] {
                            let got = select(&view, rule, part, n);
                            assert_eq!(got, sorted(&scores, rule, part), "n {n} kind {kind} {part:?} {rule:?}");
                        }
                    }
                }
            }
        }
    }
}
