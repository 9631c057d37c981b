//! Backward, token by token: suffix sums of what each query sends to the states that it read.

use super::forward::{read, states};
use super::{Problem, State, features_backward};
use crate::socket::reference::dot;

/// Gradients of everything that [`super::forward`] takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Gradients {
    /// As `q`.
    pub dq: Vec<Vec<f64>>,
    /// As `k`.
    pub dk: Vec<f64>,
    /// As `v`.
    pub dv: Vec<f64>,
    /// As `planes`.
    pub dplanes: Vec<f64>,
    /// Of β.
    pub dbeta: f64,
    /// Of the initial state.
    pub dinitial: State,
}

/// Gradients of Σ `grad_o`·o + `grad_final`·(final state), given the former per query head, `[tokens, value_dim]`.
pub fn backward(problem: &Problem<'_>, initial: &State, grad_o: &[&[f64]], grad_final: &State) -> Gradients {
    let (states, _) = states(problem, initial);
    let mut out = Gradients { dplanes: vec![0.0; problem.planes.len()], ..Gradients::default() };
    // What token i's queries send to the state that they read.
    let mut sent = vec![State::zeros(problem.buckets(), problem.value_dim); problem.tokens()];
    for (q, grad_o) in problem.q.iter().zip(grad_o) {
        let mut dq = Vec::new();
        for (i, phi) in problem.features(q).iter().enumerate() {
            let grad_o = &grad_o[i * problem.value_dim..(i + 1) * problem.value_dim];
            let dphi = read_backward(problem, &states[i], phi, grad_o, &mut sent[i]);
            dq.extend(through_hash(problem, &q[i * problem.head_dim..(i + 1) * problem.head_dim], &dphi, &mut out));
        }
        out.dq.push(dq);
    }

    // The gradient of the state after token j: what arrives at the end, and what later readers send.
    let mut later = grad_final.clone();
    if !problem.causal {
        sent.iter().for_each(|sent| add(&mut later, sent));
    }
    let key_features = problem.features(problem.k);
    let (mut dk, mut dv) = (Vec::new(), Vec::new());
    for j in (0..problem.tokens()).rev() {
        if problem.causal {
            add(&mut later, &sent[j]);
        }
        let v = &problem.v[j * problem.value_dim..(j + 1) * problem.value_dim];
        let dphi: Vec<f64> = (0..problem.buckets()).map(|s| later.a[s] + dot(later.row(s), v)).collect();
        let mut row = vec![0.0; problem.value_dim];
        for (s, phi) in key_features[j].iter().enumerate() {
            row.iter_mut().zip(later.row(s)).for_each(|(dv, b)| *dv += phi * b);
        }
        dv.push(row);
        dk.push(through_hash(problem, &problem.k[j * problem.head_dim..(j + 1) * problem.head_dim], &dphi, &mut out));
    }
    out.dk = dk.into_iter().rev().flatten().collect();
    out.dv = dv.into_iter().rev().flatten().collect();
    out.dinitial = later;
    out
}

/// Gradient of one read with respect to φ(q); adds that with respect to the state to `sent`.
fn read_backward(problem: &Problem<'_>, state: &State, phi: &[f64], grad_o: &[f64], sent: &mut State) -> Vec<f64> {
    let dim = problem.value_dim;
    let mut dphi = vec![0.0; phi.len()];
    if problem.normalization.is_ratio() {
        // o = N / D with N = φ·B and D = φ·A.
        let mass = dot(phi, &state.a);
        if mass <= 0.0 {
            return dphi;
        }
        let o = read(problem, state, phi);
        let dnumerator: Vec<f64> = grad_o.iter().map(|g| g / mass).collect();
        let dmass = -dot(grad_o, &o) / mass;
        for (s, dphi) in dphi.iter_mut().enumerate() {
            *dphi = dot(&dnumerator, state.row(s)) + dmass * state.a[s];
            sent.a[s] += phi[s] * dmass;
            let row = &mut sent.b[s * dim..(s + 1) * dim];
            row.iter_mut().zip(&dnumerator).for_each(|(b, d)| *b += phi[s] * d);
        }
    } else {
        // o = Σ_s y_s·B_s with y_s = share·φ_s / (A_s + ε).
        for (s, dphi) in dphi.iter_mut().enumerate() {
            let weight = problem.share() / (state.a[s] + problem.epsilon);
            let dy = dot(grad_o, state.row(s));
            *dphi = dy * weight;
            sent.a[s] -= dy * phi[s] * weight / (state.a[s] + problem.epsilon);
            let row = &mut sent.b[s * dim..(s + 1) * dim];
            row.iter_mut().zip(grad_o).for_each(|(b, g)| *b += phi[s] * weight * g);
        }
    }
    dphi
}

fn through_hash(problem: &Problem<'_>, x: &[f64], dphi: &[f64], out: &mut Gradients) -> Vec<f64> {
    let hash = features_backward(problem.planes, problem.planes_per_table, problem.beta, x, dphi);
    out.dbeta += hash.dbeta;
    out.dplanes.iter_mut().zip(&hash.dplanes).for_each(|(sum, d)| *sum += d);
    hash.dx
}

fn add(to: &mut State, other: &State) {
    to.a.iter_mut().zip(&other.a).for_each(|(x, y)| *x += y);
    to.b.iter_mut().zip(&other.b).for_each(|(x, y)| *x += y);
}
