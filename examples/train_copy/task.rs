//! Multi-query associative recall (Zoology, arXiv 2312.04927): pairs of key and value, then keys whose values are
//! asked for, among noise.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Sizes of the task.
#[derive(Clone, Copy, Debug)]
pub struct Task {
    /// Half of the tokens are keys, half values.
    pub vocabulary: usize,
    pub tokens: usize,
    pub pairs: usize,
}

/// Sequences, and what is asked of them.
pub struct Batch {
    /// `[sequences, tokens]`.
    pub inputs: Vec<usize>,
    /// Rows of `inputs` at which a query stands, and the value that belongs there.
    pub answers: Vec<(usize, usize)>,
}

/// Exponent of the law by which queries come soon after the pairs rather than late (Zoology's `power_a`).
const POWER: f64 = 0.01;

impl Task {
    /// Whether it can be drawn: keys enough, and a place for every query.
    pub fn check(&self) -> Result<(), String> {
        let places = self.tokens.saturating_sub(2 * self.pairs) / 2;
        if self.pairs == 0 || self.pairs > places || self.pairs + 1 > self.vocabulary / 2 {
            return Err(format!(
                "{} pairs need more than twice as many tokens of vocabulary and four times as many of sequence; \
                 got {} and {}",
                self.pairs, self.vocabulary, self.tokens
            ));
        }
        Ok(())
    }
}

/// An endless supply of sequences.
pub struct Source {
    task: Task,
    rng: ChaCha8Rng,
    /// Weight of each place for a query.
    places: Vec<f64>,
}

impl Source {
    pub fn new(task: Task, seed: u64) -> Self {
        let places = (1..=(task.tokens - 2 * task.pairs) / 2).map(|i| (i as f64).powf(POWER - 1.0)).collect();
        Self { task, rng: ChaCha8Rng::seed_from_u64(seed), places }
    }

    pub fn batch(&mut self, sequences: usize) -> Batch {
        let mut batch = Batch { inputs: Vec::new(), answers: Vec::new() };
        for _ in 0..sequences {
            self.sequence(&mut batch);
        }
        batch
    }

    fn sequence(&mut self, batch: &mut Batch) {
        let Task { vocabulary, tokens, pairs } = self.task;
        let first = batch.inputs.len();
        let half = vocabulary / 2;
        let keys = self.distinct(&vec![1.0; half], pairs);
        let values: Vec<usize> =
            self.distinct(&vec![1.0; vocabulary - half], pairs).into_iter().map(|v| half + v).collect();
        // Noise, then what matters over it.
        batch.inputs.extend((0..tokens).map(|_| (self.rng.next_u64() % vocabulary as u64) as usize));
        for i in 0..pairs {
            batch.inputs[first + 2 * i] = keys[i];
            batch.inputs[first + 2 * i + 1] = values[i];
        }
        let places = self.places.clone();
        for (i, place) in self.distinct(&places, pairs).into_iter().enumerate() {
            let row = first + 2 * pairs + 2 * place;
            batch.inputs[row] = keys[i];
            batch.answers.push((row, values[i]));
        }
    }

    /// `count` different indices, drawn one after the other by weight.
    fn distinct(&mut self, weights: &[f64], count: usize) -> Vec<usize> {
        let mut weights = weights.to_vec();
        (0..count)
            .map(|_| {
                let total: f64 = weights.iter().sum();
                let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
                let open = || weights.iter().enumerate().filter(|(_, w)| **w > 0.0);
                let chosen = open().find(|(_, w)| {
                    left -= **w;
                    left < 0.0
                });
                let chosen = chosen.or_else(|| open().next_back()).map_or(0, |(i, _)| i);
                weights[chosen] = 0.0;
                chosen
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_query_has_its_value_in_the_context() {
        let task = Task { vocabulary: 32, tokens: 40, pairs: 6 };
        let batch = Source::new(task, 1).batch(50);
        assert_eq!(batch.answers.len(), 300);
        for (row, value) in batch.answers {
            let sequence = &batch.inputs[row / 40 * 40..][..12];
            let key = sequence.iter().step_by(2).position(|&k| k == batch.inputs[row]).unwrap();
            assert_eq!(sequence[2 * key + 1], value);
            assert!(value >= 16 && batch.inputs[row] < 16 && row % 40 >= 12);
        }
    }

    #[test]
    fn impossible_sizes_are_refused() {
        assert!(Task { vocabulary: 32, tokens: 64, pairs: 15 }.check().is_ok());
        assert!(Task { vocabulary: 32, tokens: 64, pairs: 16 }.check().is_err());
        assert!(Task { vocabulary: 32, tokens: 59, pairs: 15 }.check().is_err());
    }
}
