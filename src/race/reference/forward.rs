//! Forward, token by token.

use super::Problem;
use crate::socket::reference::dot;

/// A = Σ φ(k), `[buckets]`, and B = Σ φ(k) ⊗ v, `[buckets, value_dim]`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct State {
    /// Mass of each bucket.
    pub a: Vec<f64>,
    /// Value sum of each bucket.
    pub b: Vec<f64>,
}

impl State {
    /// Nothing seen yet.
    pub fn zeros(buckets: usize, value_dim: usize) -> Self {
        Self { a: vec![0.0; buckets], b: vec![0.0; buckets * value_dim] }
    }

    /// Takes in a key of weights `phi` with its value.
    pub fn absorb(&mut self, phi: &[f64], v: &[f64]) {
        for (s, phi) in phi.iter().enumerate() {
            self.a[s] += phi;
            self.b[s * v.len()..(s + 1) * v.len()].iter_mut().zip(v).for_each(|(b, v)| *b += phi * v);
        }
    }

    /// Value sum of bucket `s`.
    pub(super) fn row(&self, s: usize) -> &[f64] {
        let dim = self.b.len() / self.a.len();
        &self.b[s * dim..(s + 1) * dim]
    }
}

/// What a query of weights `phi` reads from a state: `[value_dim]`. Nothing, where there is no mass to divide by.
pub(super) fn read(problem: &Problem<'_>, state: &State, phi: &[f64]) -> Vec<f64> {
    let mut o = vec![0.0; problem.value_dim];
    let mass = dot(phi, &state.a);
    for (s, phi) in phi.iter().enumerate() {
        let weight = if problem.normalization.is_ratio() {
            if mass > 0.0 { phi / mass } else { 0.0 }
        } else {
            problem.share() * phi / (state.a[s] + problem.epsilon)
        };
        o.iter_mut().zip(state.row(s)).for_each(|(o, b)| *o += weight * b);
    }
    o
}

/// Outputs of each query head, `[tokens, value_dim]`, and the state after all tokens.
pub fn forward(problem: &Problem<'_>, initial: &State) -> (Vec<Vec<f64>>, State) {
    let (states, last) = states(problem, initial);
    let heads = problem.q.iter().map(|q| {
        let phi = problem.features(q);
        phi.iter().zip(&states).flat_map(|(phi, state)| read(problem, state, phi)).collect()
    });
    (heads.collect(), last)
}

/// The state that each token reads, and the one after all.
pub(super) fn states(problem: &Problem<'_>, initial: &State) -> (Vec<State>, State) {
    let mut state = initial.clone();
    let mut prefixes = Vec::new();
    for (phi, v) in problem.features(problem.k).iter().zip(problem.v.chunks_exact(problem.value_dim)) {
        state.absorb(phi, v);
        prefixes.push(state.clone());
    }
    if !problem.causal {
        prefixes.fill(state.clone());
    }
    (prefixes, state)
}
