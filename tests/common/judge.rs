//! Compares what a device computed with the f64 reference.
//!
//! Numbers may be twice as wrong as a naive f32 implementation, and 1e-6 of the largest. A selection must be the
//! reference's wherever the scores' errors cannot change it: each key has an interval that its score lies in, and a key
//! is in or out for certain where the intervals say so. A sign bit whose projection is too close to zero for f32
//! widens its key's interval by what the other sign would change.

use super::problem::{Data, Problem};
use proptest::{prelude::*, test_runner::TestCaseError};
use softhash::socket::reference as math;
use softhash::{Attended, DType, Device, Mode, Rule, Scoring, SelectionScope};
use std::collections::HashMap;

pub type Judged = Result<(), TestCaseError>;

/// Share of ‖w‖·‖x‖ below which a projection's sign is left to rounding.
const UNSURE: f64 = 4e-6;

/// One sequence in f64 and its expected selections.
struct Sequence<'a> {
    problem: &'a Problem,
    planes: Vec<f64>,
    q: Vec<f64>,
    k: Vec<f64>,
    v: Vec<f64>,
    len: usize,
    scale: f64,
}

fn widen(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| f64::from(x)).collect()
}

fn narrow(x: &[f64]) -> Vec<f32> {
    x.iter().map(|&x| x as f32).collect()
}

fn dot32(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).fold(0.0, |sum, (a, b)| sum + a * b)
}

/// How far one score may be off, and the score.
#[derive(Clone, Copy)]
struct Interval {
    score: f64,
    error: f64,
}

/// What hashing one kv head's keys gives, in f64 and naively in f32.
struct Index<'a> {
    keys: Vec<&'a [f64]>,
    values: Vec<&'a [f64]>,
    planes: &'a [f64],
    /// Absent while the mean is awaited.
    mean: Option<Vec<f64>>,
    projections: Vec<Vec<f64>>,
    gains: Vec<f64>,
    naive_gains: Vec<f32>,
    /// Bits of each key whose sign f32 cannot be sure of.
    unsure: Vec<Vec<usize>>,
}

impl<'a> Sequence<'a> {
    fn new(problem: &'a Problem, data: &Data, b: usize) -> Self {
        let (config, shape) = (&problem.config, problem.shape);
        let rows = config.hyperplanes.rows(config.tables, config.planes, shape.head_dim, shape.num_kv_heads).unwrap();
        let one = problem.tq * shape.num_q_heads * shape.head_dim;
        Self {
            problem,
            planes: widen(&rows),
            q: widen(&data.q.exact[b * one..(b + 1) * one]),
            k: widen(&data.k[b]),
            v: widen(&data.v[b]),
            len: problem.lengths[b],
            scale: f64::from((1.0 / (shape.head_dim as f64).sqrt()) as f32),
        }
    }

    fn visible(&self, t: usize) -> usize {
        (self.len + t + 1).saturating_sub(self.problem.tq)
    }

    fn query(&self, t: usize, head: usize) -> &[f64] {
        let shape = self.problem.shape;
        &self.q[(t * shape.num_q_heads + head) * shape.head_dim..][..shape.head_dim]
    }

    fn index(&self, kv_head: usize) -> Index<'_> {
        let (config, shape) = (&self.problem.config, self.problem.shape);
        let one = config.tables * config.planes * shape.head_dim;
        let planes = if self.planes.len() == one { &self.planes } else { &self.planes[kv_head * one..][..one] };
        let keys = math::head_rows(&self.k, shape.num_kv_heads, shape.head_dim, kv_head);
        let values = math::head_rows(&self.v, shape.num_kv_heads, shape.value_dim, kv_head);
        let mean = match config.center {
            Some(count) => math::mean_of_first(&keys, count),
            None => Some(vec![0.0; shape.head_dim]),
        };
        let mut index = Index {
            keys,
            values,
            planes,
            mean,
            projections: vec![],
            gains: vec![],
            naive_gains: vec![],
            unsure: vec![],
        };
        let Some(mean) = &index.mean else { return index };
        let lengths: Vec<f64> = planes.chunks_exact(shape.head_dim).map(math::norm).collect();
        let (planes32, mean32) = (narrow(planes), narrow(mean));
        for key in &index.keys {
            let centred: Vec<f64> = key.iter().zip(mean).map(|(k, m)| k - m).collect();
            let projected = math::project(planes, &centred);
            let slack = UNSURE * (math::norm(key) + math::norm(mean));
            let unsure = projected.iter().zip(&lengths).enumerate().filter(|(_, (u, w))| u.abs() <= slack * **w);
            index.unsure.push(unsure.map(|(i, _)| i).collect());
            index.gains.push(math::sign_gain(&centred, &projected));
            if config.scoring == Scoring::SignProjection {
                let centred: Vec<f32> = narrow(key).iter().zip(&mean32).map(|(k, m)| k - m).collect();
                let sum: f32 = planes32.chunks_exact(centred.len()).map(|w| dot32(w, &centred).abs()).sum();
                index.naive_gains.push(if sum > 0.0 { dot32(&centred, &centred) / sum } else { 0.0 });
            }
            index.projections.push(projected);
        }
        index
    }
}

/// The query's side of a score.
struct Query {
    projections: Vec<f64>,
    phi: Vec<f64>,
    offset: f64,
    /// Bits whose sign f32 cannot be sure of.
    unsure: Vec<usize>,
    /// σ(±2·β·tanh u) of every bit in f32, for bit 0 and bit 1.
    naive_sigma: Vec<[f32; 2]>,
    naive_projections: Vec<f32>,
    naive_offset: f32,
}

impl Index<'_> {
    fn query(&self, problem: &Problem, mean: &[f64], q: &[f64]) -> Query {
        let config = &problem.config;
        let q = if config.normalize_query { math::normalized(q) } else { q.to_vec() };
        let projections = math::project(self.planes, &q);
        let slack = UNSURE * math::norm(&q);
        let lengths = self.planes.chunks_exact(q.len()).map(math::norm);
        let unsure = projections.iter().zip(lengths).enumerate().filter(|(_, (u, w))| u.abs() <= slack * w);
        let unsure = unsure.map(|(i, _)| i).collect();
        let beta = config.temperature.beta(q.len());
        let phi = match config.scoring {
            Scoring::SoftCollision => math::soft_hash(&projections, config.planes, f64::from(beta)),
            _ => Vec::new(),
        };
        let (planes32, q32) = (narrow(self.planes), narrow(&q));
        let naive_projections: Vec<f32> = planes32.chunks_exact(q.len()).map(|w| dot32(w, &q32)).collect();
        let sigma = |u: &f32| [1.0, -1.0].map(|sign: f32| 1.0 / (1.0 + (sign * 2.0 * beta * u.tanh()).exp()));
        let naive_sigma = naive_projections.iter().map(sigma).collect();
        let (offset, naive_offset) = (math::dot(&q, mean), dot32(&q32, &narrow(mean)));
        Query { projections, phi, offset, unsure, naive_sigma, naive_projections, naive_offset }
    }

    /// The score of key `j`, its projections given apart so that a sign can be turned.
    fn score(&self, problem: &Problem, query: &Query, j: usize, key: &[f64], scale: f64) -> f64 {
        let config = &problem.config;
        let weight = if config.value_norm { math::norm(self.values[j]) } else { 1.0 };
        let codes = |u: &[f64]| math::codes(u, config.planes);
        match config.scoring {
            Scoring::SoftCollision => weight * math::soft_collision(&query.phi, &codes(key)),
            Scoring::HardCollision => weight * math::hard_collision(&codes(&query.projections), &codes(key)),
            Scoring::Hamming => weight * math::hamming(&query.projections, key),
            Scoring::SignProjection => {
                scale * math::sign_projection(query.offset, &query.projections, key, self.gains[j]) + weight.ln()
            }
        }
    }

    fn naive_score(&self, problem: &Problem, query: &Query, j: usize, scale: f64) -> f32 {
        let config = &problem.config;
        let value = narrow(self.values[j]);
        let weight = if config.value_norm { dot32(&value, &value).sqrt() } else { 1.0 };
        let bits: Vec<usize> = self.projections[j].iter().map(|u| usize::from(*u >= 0.0)).collect();
        match config.scoring {
            Scoring::SoftCollision => {
                let tables = query.naive_sigma.chunks(config.planes).zip(bits.chunks(config.planes));
                let product = |(sigma, bits): (&[[f32; 2]], &[usize])| -> f32 {
                    sigma.iter().zip(bits).map(|(sigma, &bit)| sigma[bit]).product()
                };
                weight * tables.map(product).sum::<f32>()
            }
            Scoring::SignProjection => {
                let terms = query.naive_projections.iter().zip(&bits).map(|(u, &bit)| if bit == 1 { *u } else { -*u });
                let sum: f32 = terms.sum();
                (query.naive_offset + self.naive_gains[j] * sum) * scale as f32 + weight.ln()
            }
            // Counts are exact; the weight alone rounds.
            _ => {
                weight * self.score(problem, query, j, &self.projections[j], scale) as f32
                    / self.exact_weight(problem, j)
            }
        }
    }

    fn exact_weight(&self, problem: &Problem, j: usize) -> f32 {
        if problem.config.value_norm { math::norm(self.values[j]) as f32 } else { 1.0 }
    }

    /// Scores of the visible keys with their errors.
    fn intervals(&self, sequence: &Sequence<'_>, q: &[f64], visible: usize, floor: f64) -> Vec<Interval> {
        let (problem, scale) = (sequence.problem, sequence.scale);
        let config = &problem.config;
        let Some(mean) = &self.mean else { return vec![Interval { score: 0.0, error: 0.0 }; visible] };
        let query = self.query(problem, mean, q);
        let whole = !config.value_norm && matches!(config.scoring, Scoring::HardCollision | Scoring::Hamming);
        let own: Vec<f64> = (0..visible).map(|j| self.score(problem, &query, j, &self.projections[j], scale)).collect();
        let mut base = 0.0;
        if !whole {
            let naive = (0..visible).map(|j| (f64::from(self.naive_score(problem, &query, j, scale)) - own[j]).abs());
            let largest = own.iter().map(|x| x.abs()).fold(0.0, f64::max);
            base = 2.0 * naive.fold(0.0, f64::max) + floor * largest;
        }
        if config.scoring == Scoring::SignProjection {
            // Where the terms of a sum cancel, its error is of their size and not of the sum's; with few keys the naive
            // sum may be nearer by luck.
            let terms: f64 = query.projections.iter().map(|u| u.abs()).sum();
            let gain = self.gains[..visible].iter().copied().fold(0.0, f64::max);
            base += f64::from(f32::EPSILON) * scale * gain * terms;
        }
        // Counts change where the query's own sign is unsure; sums and products do not, for there it is near zero.
        let unsure_counts = match config.scoring {
            Scoring::HardCollision | Scoring::Hamming => query.unsure.len() as f64,
            _ => 0.0,
        };
        let interval = |j: usize| {
            let mut key = self.projections[j].clone();
            let mut error = base + unsure_counts * f64::from(self.exact_weight(problem, j));
            for &bit in &self.unsure[j] {
                let turned = if key[bit] >= 0.0 { -1e-300 } else { 1e-300 };
                let before = std::mem::replace(&mut key[bit], turned);
                error += (self.score(problem, &query, j, &key, scale) - own[j]).abs();
                key[bit] = before;
            }
            Interval { score: own[j], error }
        };
        (0..visible).map(interval).collect()
    }
}

/// Judges a selection, ascending, against the scores it should come from.
fn judge_selection(problem: &Problem, intervals: &[Interval], signs: &[&[f64]], got: &[(usize, f32)]) -> Judged {
    let config = &problem.config;
    let n = intervals.len();
    let chosen: Vec<usize> = got.iter().map(|x| x.0).collect();
    prop_assert!(chosen.windows(2).all(|w| w[0] < w[1]), "indices are not ascending: {chosen:?}");
    prop_assert!(chosen.iter().all(|&j| j < n), "an index is beyond the {n} visible keys: {chosen:?}");
    for &(j, score) in got {
        let Interval { score: want, error } = intervals[j];
        prop_assert!((f64::from(score) - want).abs() <= error, "score of key {j}: {score}, not {want} ± {error:e}");
    }
    let heavy = math::heavy(config, n);
    let unhashed = signs.len() < n;
    if unhashed || n <= config.sink + config.window + heavy {
        prop_assert_eq!(chosen.len(), n, "all keys fit the budget");
        return Ok(());
    }
    if intervals.iter().all(|i| i.error == 0.0) {
        let scores: Vec<f64> = intervals.iter().map(|i| i.score).collect();
        prop_assert_eq!(&chosen, &math::select(&scores, config.rule, config.sink, config.window, heavy));
        return Ok(());
    }
    let always = |j: usize| j < config.sink || j >= n - config.window;
    let fixed = config.sink + config.window;
    match config.rule {
        Rule::Disjoint => prop_assert_eq!(chosen.len(), fixed + heavy),
        Rule::Union => prop_assert!((fixed.max(heavy)..=fixed + heavy).contains(&chosen.len())),
    }
    let candidates: Vec<usize> = (0..n).filter(|&j| config.rule == Rule::Union || !always(j)).collect();
    let sorted = |f: fn(&Interval) -> f64| {
        let mut ends: Vec<f64> = candidates.iter().map(|&j| f(&intervals[j])).collect();
        ends.sort_by(f64::total_cmp);
        ends
    };
    let (highest, lowest) = (sorted(|i| i.score + i.error), sorted(|i| i.score - i.error));
    let mut is_chosen = vec![false; n];
    chosen.iter().for_each(|&j| is_chosen[j] = true);
    for j in 0..n {
        if always(j) {
            prop_assert!(is_chosen[j], "key {j} of sink or window is not selected");
            continue;
        }
        let Interval { score, error } = intervals[j];
        // Itself is among those that may reach it.
        let may_beat = highest.len() - highest.partition_point(|&x| x < score - error) - 1;
        let surely_beat = lowest.len() - lowest.partition_point(|&x| x <= score + error);
        prop_assert!(may_beat >= heavy || is_chosen[j], "key {j} is not selected: {may_beat} may beat it of {heavy}");
        prop_assert!(surely_beat < heavy || !is_chosen[j], "key {j} is selected: {surely_beat} beat it, {heavy} fit");
    }
    // Equal bits give equal scores where no weight and no gain is a key's own: then the lower index goes first.
    if !config.value_norm && config.scoring != Scoring::SignProjection {
        let mut refused: HashMap<Vec<bool>, usize> = HashMap::new();
        for j in (0..n).filter(|&j| !always(j)) {
            let key: Vec<bool> = signs[j].iter().map(|u| *u >= 0.0).collect();
            if signs[j].iter().any(|u| u.abs() < 1e-3) {
                continue;
            }
            if !is_chosen[j] {
                refused.entry(key).or_insert(j);
            } else if let Some(lower) = refused.get(&key) {
                return Err(TestCaseError::fail(format!("key {j} is selected, its equal {lower} is not")));
            }
        }
    }
    Ok(())
}

/// Attention over a set in plain f32.
fn naive_attention(q: &[f32], keys: &[Vec<f32>], values: &[Vec<f32>], set: &[usize], scale: f32, o: &mut [f32]) -> f32 {
    let logits: Vec<f32> = set.iter().map(|&j| scale * dot32(q, &keys[j])).collect();
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let mut sum = 0.0;
    for (&j, logit) in set.iter().zip(&logits) {
        let weight = (logit - largest).exp();
        sum += weight;
        o.iter_mut().zip(&values[j]).for_each(|(o, v)| *o += weight * v);
    }
    if sum > 0.0 {
        o.iter_mut().for_each(|o| *o /= sum);
    }
    largest + sum.ln()
}

/// Half a unit in the last place, relative.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1.0 / 2048.0,
        DType::Bf16 => 1.0 / 256.0,
        _ => 0.0,
    }
}

fn distance(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b) * (a - b)).sum::<f64>().sqrt()
}

/// Judges o and lse of one sequence: `sets` holds the attended keys of `[query token, num_q_heads]`.
fn judge_output(sequence: &Sequence<'_>, dtype: DType, sets: &[Vec<usize>], o: &[f64], lse: &[f64]) -> Judged {
    let shape = sequence.problem.shape;
    let (mut want_o, mut naive_o) = (Vec::new(), Vec::new());
    let (mut want_lse, mut naive_lse) = (Vec::new(), Vec::new());
    for kv_head in 0..shape.num_kv_heads {
        let keys = math::head_rows(&sequence.k, shape.num_kv_heads, shape.head_dim, kv_head);
        let values = math::head_rows(&sequence.v, shape.num_kv_heads, shape.value_dim, kv_head);
        let narrow_rows = |rows: &[&[f64]]| rows.iter().map(|r| narrow(r)).collect::<Vec<_>>();
        let (keys32, values32) = (narrow_rows(&keys), narrow_rows(&values));
        for t in 0..sequence.problem.tq {
            for head in kv_head * shape.group()..(kv_head + 1) * shape.group() {
                let row = t * shape.num_q_heads + head;
                let q = sequence.query(t, head);
                let (exact, exact_lse) = math::attend(q, &keys, &values, &sets[row], sequence.scale, shape.value_dim);
                let mut naive = vec![0.0; shape.value_dim];
                let scale = sequence.scale as f32;
                let naive_row = naive_attention(&narrow(q), &keys32, &values32, &sets[row], scale, &mut naive);
                want_o.push((row, exact));
                naive_o.push((row, widen(&naive)));
                want_lse.push((row, exact_lse));
                naive_lse.push((row, f64::from(naive_row)));
            }
        }
    }
    let rows = |mut x: Vec<(usize, Vec<f64>)>| {
        x.sort_by_key(|x| x.0);
        x.into_iter().flat_map(|x| x.1).collect::<Vec<f64>>()
    };
    let (want, naive) = (rows(want_o), rows(naive_o));
    let size = distance(&want, &vec![0.0; want.len()]);
    // What f16 has below its smallest normal number comes on top.
    let floor = if dtype == DType::F16 { (want.len() as f64).sqrt() * 3e-8 } else { 0.0 };
    let bound = 2.0 * distance(&naive, &want) + (1e-6 + rounding(dtype)) * size + floor;
    let error = distance(o, &want);
    prop_assert!(error <= bound, "o is off by {error:e}, the bound is {bound:e}, its size {size:e}");
    let single = |x: Vec<(usize, f64)>| rows(x.into_iter().map(|(row, x)| (row, vec![x])).collect());
    let (want, naive) = (single(want_lse), single(naive_lse));
    let finite = |x: &&f64| x.is_finite();
    let largest = want.iter().filter(finite).map(|x| x.abs()).fold(1.0, f64::max);
    let pairs = naive.iter().zip(&want).filter(|(_, want)| want.is_finite());
    let bound = 2.0 * pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f64::max) + 1e-6 * largest;
    for (row, (got, want)) in lse.iter().zip(&want).enumerate() {
        let right = if want.is_finite() { (got - want).abs() <= bound } else { got == want };
        prop_assert!(right, "lse of row {row} is {got}, not {want} ± {bound:e}");
    }
    Ok(())
}

/// A result's o, lse and, per row of the selection, indices with scores.
pub struct Read {
    pub o: Vec<f64>,
    pub lse: Vec<f64>,
    pub selection: Vec<Vec<(usize, f32)>>,
    /// All bytes of the result, for comparing bits.
    pub bytes: Vec<u8>,
}

pub fn read(attended: &Attended) -> Read {
    let (o, lse) = (attended.o.read_blocking().unwrap(), attended.lse.read_blocking().unwrap());
    let mut bytes = [o.bytes(), lse.bytes()].concat();
    let mut selection = Vec::new();
    if let Some(s) = &attended.selection {
        let (indices, scores) = (s.indices.read_blocking().unwrap(), s.scores.read_blocking().unwrap());
        bytes.extend([indices.bytes(), scores.bytes()].concat());
        let width = *indices.shape().last().unwrap();
        let scores = scores.to_f32();
        for (indices, scores) in indices.to_i32().chunks(width).zip(scores.chunks(width)) {
            let used = indices.iter().take_while(|j| **j >= 0).count();
            assert!(indices[used..].iter().all(|&j| j == -1), "padding is not −1: {indices:?}");
            assert!(scores[used..].iter().all(|&s| s == 0.0), "scores in padding: {scores:?}");
            selection.push(indices[..used].iter().map(|&j| j as usize).zip(scores.iter().copied()).collect());
        }
    }
    Read { o: widen(&o.to_f32()), lse: widen(&lse.to_f32()), selection, bytes }
}

/// Judges a whole result of `decode` or of exact attention.
pub fn judge(device: &Device, problem: &Problem, data: &Data, mode: Mode, read: &Read) -> Judged {
    let (config, shape) = (&problem.config, problem.shape);
    let floor = if device.is_cpu() { 1e-6 } else { 4e-6 };
    let rows = problem.tq * shape.num_q_heads;
    let selecting = match config.scope {
        SelectionScope::PerGroup => shape.num_kv_heads,
        _ => shape.num_q_heads,
    };
    prop_assert_eq!(read.o.len(), problem.lengths.len() * rows * shape.value_dim);
    prop_assert_eq!(read.lse.len(), problem.lengths.len() * rows);
    for b in 0..problem.lengths.len() {
        let sequence = Sequence::new(problem, data, b);
        let mut sets: Vec<Vec<usize>> =
            (0..rows).map(|row| (0..sequence.visible(row / shape.num_q_heads)).collect()).collect();
        if mode == Mode::Sparse {
            prop_assert_eq!(read.selection.len(), problem.lengths.len() * problem.tq * selecting);
            for kv_head in 0..shape.num_kv_heads {
                let index = sequence.index(kv_head);
                for t in 0..problem.tq {
                    let heads = kv_head * shape.group()..(kv_head + 1) * shape.group();
                    let visible = sequence.visible(t);
                    let own: Vec<Vec<Interval>> = heads
                        .clone()
                        .map(|h| index.intervals(&sequence, sequence.query(t, h), visible, floor))
                        .collect();
                    let signs: Vec<&[f64]> = index.projections.iter().map(Vec::as_slice).collect();
                    let row = |head: usize| &read.selection[(b * problem.tq + t) * selecting + head];
                    for (g, head) in heads.clone().enumerate() {
                        let got = match config.scope {
                            SelectionScope::PerGroup => row(kv_head),
                            _ => row(head),
                        };
                        match config.scope {
                            SelectionScope::PerGroup if g == 0 => {
                                judge_selection(problem, &group_mean(&own), &signs, got)?;
                            }
                            SelectionScope::PerGroup => {}
                            _ => judge_selection(problem, &own[g], &signs, got)?,
                        }
                        sets[t * shape.num_q_heads + head] = got.iter().map(|x| x.0).collect();
                    }
                }
            }
        }
        let (o, lse) = (&read.o[b * rows * shape.value_dim..], &read.lse[b * rows..]);
        let dtype = problem.output;
        judge_output(&sequence, dtype, &sets, &o[..rows * shape.value_dim], &lse[..rows])?;
    }
    Ok(())
}

fn group_mean(own: &[Vec<Interval>]) -> Vec<Interval> {
    let mean = |f: fn(&Interval) -> f64, j: usize| own.iter().map(|o| f(&o[j])).sum::<f64>() / own.len() as f64;
    (0..own[0].len()).map(|j| Interval { score: mean(|i| i.score, j), error: mean(|i| i.error, j) }).collect()
}
