//! The exact window, query by query, and its mix with RACE.

use super::Problem;
use crate::socket::reference::{attend, dot};

/// Attention of one kv head's queries over the last tokens up to their own.
#[derive(Clone, Debug)]
pub struct Window<'a> {
    /// Tokens of the window W: a query sees its own token and the W − 1 before it.
    pub tokens: usize,
    /// Scale of the logits.
    pub scale: f64,
    /// Keys of the tokens before the problem's first, `[tokens, head_dim]`, the last one last: all, or the last W − 1.
    pub past_k: &'a [f64],
    /// Their values.
    pub past_v: &'a [f64],
}

/// Gradients of everything that [`window_forward`] takes.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct WindowGradients {
    /// As `q`.
    pub dq: Vec<Vec<f64>>,
    /// As `k`.
    pub dk: Vec<f64>,
    /// As `v`.
    pub dv: Vec<f64>,
    /// As `past_k`.
    pub dpast_k: Vec<f64>,
    /// As `past_v`.
    pub dpast_v: Vec<f64>,
}

/// All keys and values, those of the past first, and how many are of the past.
struct Seen<'a> {
    keys: Vec<&'a [f64]>,
    values: Vec<&'a [f64]>,
    past: usize,
    tokens: usize,
}

impl<'a> Seen<'a> {
    fn new(problem: &Problem<'a>, window: &Window<'a>) -> Self {
        let (d, dv) = (problem.head_dim, problem.value_dim);
        Self {
            keys: window.past_k.chunks_exact(d).chain(problem.k.chunks_exact(d)).collect(),
            values: window.past_v.chunks_exact(dv).chain(problem.v.chunks_exact(dv)).collect(),
            past: window.past_k.len() / d,
            tokens: window.tokens,
        }
    }

    /// What the query of token `i` sees.
    fn of(&self, i: usize) -> Vec<usize> {
        let end = self.past + i + 1;
        (end.saturating_sub(self.tokens)..end).collect()
    }
}

/// o of each query head, `[tokens, value_dim]`.
pub fn window_forward(problem: &Problem<'_>, window: &Window<'_>) -> Vec<Vec<f64>> {
    let seen = Seen::new(problem, window);
    let one =
        |(i, q): (usize, &[f64])| attend(q, &seen.keys, &seen.values, &seen.of(i), window.scale, problem.value_dim).0;
    problem.q.iter().map(|q| q.chunks_exact(problem.head_dim).enumerate().flat_map(one).collect()).collect()
}

/// Gradients of Σ `grad_o`·o, given per query head, `[tokens, value_dim]`.
pub fn window_backward(problem: &Problem<'_>, window: &Window<'_>, grad_o: &[&[f64]]) -> WindowGradients {
    let seen = Seen::new(problem, window);
    let (d, dv) = (problem.head_dim, problem.value_dim);
    let (mut of_keys, mut of_values) = (vec![0.0; seen.keys.len() * d], vec![0.0; seen.keys.len() * dv]);
    let mut dq = Vec::new();
    for (q, grad_o) in problem.q.iter().zip(grad_o) {
        let mut of_head = Vec::new();
        for (i, (q, grad_o)) in q.chunks_exact(d).zip(grad_o.chunks_exact(dv)).enumerate() {
            let selected = seen.of(i);
            let (o, lse) = attend(q, &seen.keys, &seen.values, &selected, window.scale, dv);
            let mut row = vec![0.0; d];
            for j in selected {
                let weight = (window.scale * dot(q, seen.keys[j]) - lse).exp();
                // ∂o/∂logit_j = weight·(v_j − o).
                let slope = weight * (dot(grad_o, seen.values[j]) - dot(grad_o, &o)) * window.scale;
                row.iter_mut().zip(seen.keys[j]).for_each(|(dq, k)| *dq += slope * k);
                of_keys[j * d..(j + 1) * d].iter_mut().zip(q).for_each(|(dk, q)| *dk += slope * q);
                of_values[j * dv..(j + 1) * dv].iter_mut().zip(grad_o).for_each(|(dv, g)| *dv += weight * g);
            }
            of_head.extend(row);
        }
        dq.push(of_head);
    }
    let (dk, dv) = (of_keys.split_off(seen.past * d), of_values.split_off(seen.past * dv));
    WindowGradients { dq, dk, dv, dpast_k: of_keys, dpast_v: of_values }
}

/// `gate·o_window + (1 − gate)·o_race`, of one query head.
pub fn mix(gate: f64, o_window: &[f64], o_race: &[f64]) -> Vec<f64> {
    o_window.iter().zip(o_race).map(|(window, race)| gate * window + (1.0 - gate) * race).collect()
}

/// Gradients of [`mix`] with respect to o_window, o_race and the gate.
pub fn mix_backward(gate: f64, o_window: &[f64], o_race: &[f64], grad_o: &[f64]) -> (Vec<f64>, Vec<f64>, f64) {
    let of_window = grad_o.iter().map(|g| gate * g).collect();
    let of_race = grad_o.iter().map(|g| (1.0 - gate) * g).collect();
    (of_window, of_race, dot(grad_o, o_window) - dot(grad_o, o_race))
}
