//! The exact window at some tokens, in f64.

use super::counter::{Counter, Part};
use super::race_truth::At;

/// The window beside RACE that a bench times.
#[derive(Clone, Copy)]
pub struct Window {
    pub tokens: u64,
    pub gate: f64,
}

impl Window {
    /// Mixes the window into what RACE gives at a token of one head out of `tokens` in all.
    pub fn mix(&self, counter: &Counter, head: usize, tokens: u64, backward: bool, race: &mut At) {
        let row = |part, token| {
            let mut row = vec![0.0; counter.channels];
            counter.row(part, token, head, &mut row);
            row
        };
        let token = race.token;
        let own = self.query(&row, token);
        let mut window = At { token, o: own.o.clone(), ..At::default() };
        if backward {
            let (scale, zero) = (self.scale(counter), vec![0.0; counter.channels]);
            (window.dq, window.dk, window.dv) = (zero.clone(), zero.clone(), zero);
            for (key, weight) in (own.first..=token).zip(&own.weights) {
                let slope = weight * (dot(&row(Part::GradO, token), &row(Part::V, key)) - own.mean) * scale;
                add(&mut window.dq, slope, &row(Part::K, key));
            }
            for query in token..tokens.min(token + self.tokens) {
                let seen = self.query(&row, query);
                let weight = seen.weights[(token - seen.first) as usize];
                let grad_o = row(Part::GradO, query);
                add(&mut window.dv, weight, &grad_o);
                let slope = weight * (dot(&grad_o, &row(Part::V, token)) - seen.mean) * scale;
                add(&mut window.dk, slope, &row(Part::Q, query));
            }
        }
        for (race, window) in [&mut race.o, &mut race.dq, &mut race.dk, &mut race.dv].into_iter().zip(window.parts()) {
            race.iter_mut().zip(window).for_each(|(race, window)| *race += self.gate * (window - *race));
        }
    }

    fn scale(&self, counter: &Counter) -> f64 {
        1.0 / (counter.channels as f64).sqrt()
    }

    fn query(&self, row: &impl Fn(Part, u64) -> Vec<f64>, token: u64) -> Query {
        let (q, first) = (row(Part::Q, token), (token + 1).saturating_sub(self.tokens));
        let scale = 1.0 / (q.len() as f64).sqrt();
        let mut weights: Vec<f64> = (first..=token).map(|key| (dot(&q, &row(Part::K, key)) * scale).exp()).collect();
        let sum: f64 = weights.iter().sum();
        weights.iter_mut().for_each(|weight| *weight /= sum);
        let mut o = vec![0.0; q.len()];
        (first..=token).zip(&weights).for_each(|(key, weight)| add(&mut o, *weight, &row(Part::V, key)));
        let mean = dot(&row(Part::GradO, token), &o);
        Query { first, weights, o, mean }
    }
}

/// What a query sees, from which token on; its output, and that times the output's gradient.
struct Query {
    first: u64,
    weights: Vec<f64>,
    o: Vec<f64>,
    mean: f64,
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn add(to: &mut [f64], weight: f64, x: &[f64]) {
    to.iter_mut().zip(x).for_each(|(to, x)| *to += weight * x);
}
