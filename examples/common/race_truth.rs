//! RACE attention in f64 at chosen tokens of one head, over counter-made tensors of any length: every token is taken in,
//! none is held. Independent of the library but for the gradient of the hash.
//!
//! Costs O(tokens · buckets · channels) in f64, on all threads: forward twice, backward five times that; of tokens that
//! repeat, forward once per period, and backward from the first token asked about.

use super::counter::{Counter, Part};
use rayon::prelude::*;
use softhash::race::reference::features_backward;
use softhash::{DType, Result, Tensor};
use std::collections::HashMap;
use std::ops::Range;

/// A head and its hash, under the ratio normalisation, causal.
pub struct Truth {
    pub counter: Counter,
    pub head: usize,
    /// `[tables * planes_per_table, channels]`.
    pub planes: Vec<f64>,
    pub planes_per_table: usize,
    pub beta: f64,
}

/// What is true at one token: `[channels]` each; the gradients are empty where they were not asked for.
#[derive(Clone, Debug, Default)]
pub struct At {
    pub token: u64,
    pub o: Vec<f64>,
    pub dq: Vec<f64>,
    pub dk: Vec<f64>,
    pub dv: Vec<f64>,
}

impl At {
    /// o, dq, dk and dv.
    pub fn parts(&self) -> [&[f64]; 4] {
        [&self.o, &self.dq, &self.dk, &self.dv]
    }
}

/// Sums over tokens: φ·mass per bucket, and φ ⊗ row.
#[derive(Clone)]
pub struct Sums {
    pub a: Vec<f64>,
    pub b: Vec<f64>,
}

impl Sums {
    #[inline(always)]
    fn add(&mut self, phi: &[f64], mass: f64, row: &[f64]) {
        for ((phi, a), b) in phi.iter().zip(&mut self.a).zip(self.b.chunks_exact_mut(row.len())) {
            *a += phi * mass;
            b.iter_mut().zip(row).for_each(|(b, x)| *b += phi * x);
        }
    }

    pub fn add_all(&mut self, other: &Self) {
        self.a.iter_mut().zip(&other.a).for_each(|(x, y)| *x += y);
        self.b.iter_mut().zip(&other.b).for_each(|(x, y)| *x += y);
    }

    /// φ·A, and φ·B into `out`.
    #[inline(always)]
    fn read(&self, phi: &[f64], out: &mut [f64]) -> f64 {
        out.fill(0.0);
        for (phi, b) in phi.iter().zip(self.b.chunks_exact(out.len())) {
            out.iter_mut().zip(b).for_each(|(o, b)| *o += phi * b);
        }
        phi.iter().zip(&self.a).map(|(p, a)| p * a).sum()
    }

    /// Gradient of φ where (φ·A, φ·B) gets (`mass`, `row`).
    fn gradient(&self, mass: f64, row: &[f64]) -> Vec<f64> {
        let rows = self.b.chunks_exact(row.len());
        self.a.iter().zip(rows).map(|(a, b)| a * mass + b.iter().zip(row).map(|(b, x)| b * x).sum::<f64>()).collect()
    }
}

/// One token's rows and weights, used again for the next.
struct Token {
    row: Vec<f64>,
    phi: Vec<f64>,
}

/// In eight sums, which the compiler can keep in vectors.
#[inline(always)]
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a, b) = (a.chunks_exact(8), b.chunks_exact(8));
    let rest: f64 = a.remainder().iter().zip(b.remainder()).map(|(a, b)| a * b).sum();
    for (a, b) in a.zip(b) {
        sums.iter_mut().zip(a).zip(b).for_each(|((sum, a), b)| *sum += a * b);
    }
    rest + sums.iter().sum::<f64>()
}

/// Tokens summed up by one thread at a time.
const BLOCK: u64 = 1 << 15;

/// The sums of a piece, with whatever vectors there are: of its keys, or, given the state before it, of what its queries
/// send.
struct Sum<'a> {
    truth: &'a Truth,
    piece: Range<u64>,
    state: Option<Sums>,
}

impl pulp::NullaryFnOnce for Sum<'_> {
    type Output = Sums;

    // Inlined, with all that it calls, it is compiled for those vectors.
    #[inline(always)]
    fn call(self) -> Sums {
        match self.state {
            None => self.truth.absorbed(self.piece),
            Some(state) => self.truth.sent(self.piece, state),
        }
    }
}

impl Truth {
    pub fn zeros(&self) -> Sums {
        let buckets = (self.planes.len() / self.counter.channels / self.planes_per_table) << self.planes_per_table;
        Sums { a: vec![0.0; buckets], b: vec![0.0; buckets * self.counter.channels] }
    }

    fn token(&self) -> Token {
        Token { row: vec![0.0; self.counter.channels], phi: vec![0.0; self.zeros().a.len()] }
    }

    #[inline(always)]
    fn rows(&self, part: Part, token: u64, out: &mut [f64]) {
        self.counter.row(part, token, self.head, out);
    }

    /// Loads q or k of a token and hashes it: φ_r = Π_p σ(±2β·tanh(w_p·x)), doubled up plane by plane.
    #[inline(always)]
    fn hash(&self, part: Part, token: u64, out: &mut Token) {
        self.rows(part, token, &mut out.row);
        let channels = self.counter.channels;
        let tables = self.planes.chunks_exact(channels * self.planes_per_table);
        for (planes, phi) in tables.zip(out.phi.chunks_exact_mut(1 << self.planes_per_table)) {
            phi[0] = 1.0;
            for (p, w) in planes.chunks_exact(channels).enumerate() {
                let u = dot(w, &out.row);
                let high = 1.0 / (1.0 + (-2.0 * self.beta * u.tanh()).exp());
                // Plane 0 is the most significant bit.
                for r in (0..1usize << p).rev() {
                    let whole = phi[r];
                    (phi[2 * r], phi[2 * r + 1]) = (whole * (1.0 - high), whole * high);
                }
            }
        }
    }

    /// All tokens in pieces: cut at blocks, before each wanted token and after it.
    pub fn pieces(&self, tokens: u64, wanted: &[u64]) -> Vec<Range<u64>> {
        let mut cuts: Vec<u64> = (0..tokens).step_by(BLOCK as usize).collect();
        cuts.extend(wanted.iter().flat_map(|&t| [t, t + 1]));
        cuts.push(tokens);
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|w| w[0]..w[1]).collect()
    }

    /// What is true at the `wanted` tokens of a sequence of `tokens`, and with `backward` the gradients. Calls
    /// `progress` with the number of tokens done; every token is done once, and with `backward` twice.
    pub fn at(&self, tokens: u64, wanted: &[u64], backward: bool, progress: impl Fn(u64) + Sync) -> Vec<At> {
        let pieces = self.pieces(tokens, wanted);
        let arch = pulp::Arch::new();
        // What a piece brings depends on where in the period it lies.
        let place = |piece: &Range<u64>| (piece.start % self.counter.period, piece.end - piece.start);
        let mut places: Vec<_> = pieces.iter().map(place).collect();
        places.sort_unstable();
        places.dedup();
        let absorbed: HashMap<_, Sums> = places
            .par_iter()
            .map(|&(start, len)| {
                let sums = arch.dispatch(Sum { truth: self, piece: start..start + len, state: None });
                progress(len);
                ((start, len), sums)
            })
            .collect();
        progress(tokens - places.iter().map(|(_, len)| len).sum::<u64>());
        // The state before every piece, and after the last.
        let mut states = vec![self.zeros()];
        for piece in &pieces {
            let mut next = states[states.len() - 1].clone();
            next.add_all(&absorbed[&place(piece)]);
            states.push(next);
        }
        drop(absorbed);
        let mut later = Vec::new();
        // Gradients see the queries from their own token on.
        let first = wanted.iter().min().map_or(0, |&token| pieces.partition_point(|p| p.start < token));
        if backward {
            later = pieces[first..]
                .par_iter()
                .zip(&states[first..])
                .map(|(piece, state)| {
                    let sent = arch.dispatch(Sum { truth: self, piece: piece.clone(), state: Some(state.clone()) });
                    progress(piece.end - piece.start);
                    sent
                })
                .collect();
            progress(pieces[..first].iter().map(|p| p.end - p.start).sum());
            for i in (1..later.len()).rev() {
                let (before, after) = later.split_at_mut(i);
                before[i - 1].add_all(&after[0]);
            }
        }
        let piece_of = |token: u64| pieces.iter().position(|p| p.start == token).unwrap_or(0);
        let later_of = |piece: usize| piece.checked_sub(first).and_then(|i| later.get(i));
        wanted.iter().map(|&t| self.one(t, &states[piece_of(t) + 1], later_of(piece_of(t)))).collect()
    }

    /// The sums of a piece's keys, or, given those before it, of what its queries send.
    #[allow(dead_code, reason = "for those who make the others elsewhere")]
    pub fn sums(&self, piece: Range<u64>, before: Option<Sums>) -> Sums {
        pulp::Arch::new().dispatch(Sum { truth: self, piece, state: before })
    }

    /// What the keys of a piece bring.
    #[inline(always)]
    fn absorbed(&self, piece: Range<u64>) -> Sums {
        let (mut sums, mut k) = (self.zeros(), self.token());
        let mut v = k.row.clone();
        for token in piece {
            self.hash(Part::K, token, &mut k);
            self.rows(Part::V, token, &mut v);
            sums.add(&k.phi, 1.0, &v);
        }
        sums
    }

    /// What the queries of a piece send to the states they read, given the state before it.
    #[inline(always)]
    fn sent(&self, piece: Range<u64>, mut state: Sums) -> Sums {
        let (mut sums, mut q, mut k) = (self.zeros(), self.token(), self.token());
        let (mut v, mut o, mut grad) = (k.row.clone(), k.row.clone(), k.row.clone());
        for token in piece {
            self.hash(Part::K, token, &mut k);
            self.rows(Part::V, token, &mut v);
            state.add(&k.phi, 1.0, &v);
            self.hash(Part::Q, token, &mut q);
            self.rows(Part::GradO, token, &mut grad);
            let mass = state.read(&q.phi, &mut o);
            let d_mass = self.divide(mass, &o, &mut grad);
            sums.add(&q.phi, d_mass, &grad);
        }
        sums
    }

    /// Gradient of the mass, and of the numerator in place of `grad`, where o = numerator / mass.
    #[inline(always)]
    fn divide(&self, mass: f64, numerator: &[f64], grad: &mut [f64]) -> f64 {
        grad.iter_mut().for_each(|g| *g /= mass);
        -grad.iter().zip(numerator).map(|(g, n)| g * n).sum::<f64>() / mass
    }

    pub fn one(&self, token: u64, state: &Sums, later: Option<&Sums>) -> At {
        let (mut q, mut o) = (self.token(), vec![0.0; self.counter.channels]);
        self.hash(Part::Q, token, &mut q);
        let mass = state.read(&q.phi, &mut o);
        let mut at = At { token, ..At::default() };
        if let Some(later) = later {
            let through = |x: &[f64], d_phi: &[f64]| {
                features_backward(&self.planes, self.planes_per_table, self.beta, x, d_phi).dx
            };
            let mut grad = o.clone();
            self.rows(Part::GradO, token, &mut grad);
            let d_mass = self.divide(mass, &o, &mut grad);
            at.dq = through(&q.row, &state.gradient(d_mass, &grad));
            let (mut k, mut v) = (self.token(), o.clone());
            self.hash(Part::K, token, &mut k);
            self.rows(Part::V, token, &mut v);
            at.dk = through(&k.row, &later.gradient(1.0, &v));
            at.dv = vec![0.0; v.len()];
            later.read(&k.phi, &mut at.dv);
        }
        at.o = o.iter().map(|o| o / mass).collect();
        at
    }
}

/// Copies `head`'s rows of a result over `range` to where [`At`] keeps them, of the tokens that lie in it.
pub fn note(
    found: &mut [At],
    head: usize,
    range: &Range<u64>,
    tensor: &Tensor,
    of: impl Fn(&mut At) -> &mut Vec<f64>,
) -> Result<()> {
    if !found.iter().any(|at| range.contains(&at.token)) {
        return Ok(());
    }
    let [heads, channels] = [tensor.shape()[2], tensor.shape()[3]];
    let data = tensor.read_blocking()?.to_f32();
    for at in found.iter_mut().filter(|at| range.contains(&at.token)) {
        let row = (at.token - range.start) as usize * heads + head;
        *of(at) = data[row * channels..(row + 1) * channels].iter().map(|x| f64::from(*x)).collect();
    }
    Ok(())
}

/// Relative error that a result from inputs of `dtype` may have: far above what rounding does, far below what any
/// mistake does.
pub fn tolerance(dtype: DType) -> f64 {
    if dtype == DType::F32 { 1e-4 } else { 1e-2 }
}

/// ‖found − truth‖ / ‖truth‖; not a number counts as infinite.
pub fn error(found: &[f64], truth: &[f64]) -> f64 {
    let off: f64 = found.iter().zip(truth).map(|(f, t)| (f - t).powi(2)).sum();
    let size: f64 = truth.iter().map(|t| t * t).sum();
    let error = (off / size).sqrt();
    if error.is_nan() || found.len() != truth.len() { f64::INFINITY } else { error }
}
