//! The counter's tensors as segments, made where they are needed.

use crate::counter::{Counter, Part};
#[cfg(feature = "wgpu")]
use crate::counter_gpu::Generator;
use softhash::{Device, Result, Segment, SegmentSource, StreamFailure, Tensor, Wanted};
use std::ops::Range;

pub struct Source {
    counter: Counter,
    tokens: u64,
    #[cfg(feature = "wgpu")]
    generator: Option<Generator>,
}

#[cfg_attr(not(feature = "wgpu"), allow(unused_variables, reason = "the device decides only where there are two"))]
impl Source {
    pub fn new(device: &Device, counter: Counter, tokens: u64) -> Self {
        #[cfg(feature = "wgpu")]
        let generator = Generator::new(device, counter);
        Self {
            counter,
            tokens,
            #[cfg(feature = "wgpu")]
            generator,
        }
    }

    /// One of the same tensors with buffers of its own.
    pub fn another(&self, device: &Device) -> Self {
        Self::new(device, self.counter, self.tokens)
    }

    pub fn tensor(&mut self, part: Part, tokens: Range<u64>) -> Result<Tensor> {
        #[cfg(feature = "wgpu")]
        if let Some(generator) = &mut self.generator {
            return generator.tensor(part, tokens);
        }
        self.counter.tensor(part, tokens)
    }

    /// The first tokens made on the device are those made on the host, bit for bit.
    pub fn check(&mut self) -> Result<bool> {
        for part in [Part::Q, Part::K, Part::V, Part::GradO] {
            let tokens = self.tokens.saturating_sub(100)..self.tokens;
            let made = self.tensor(part, tokens.clone())?.read_blocking()?;
            if made.bytes() != self.counter.tensor(part, tokens)?.read_blocking()?.bytes() {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Bytes of the device that it holds.
    pub fn bytes(&self) -> u64 {
        #[cfg(feature = "wgpu")]
        if let Some(generator) = &self.generator {
            return generator.bytes();
        }
        0
    }
}

impl SegmentSource for Source {
    fn batch(&self) -> usize {
        1
    }

    fn tokens(&self) -> u64 {
        self.tokens
    }

    fn read(&mut self, tokens: Range<u64>, wanted: Wanted) -> std::result::Result<Segment, StreamFailure> {
        let mut make = |wanted: bool, part| wanted.then(|| self.tensor(part, tokens.clone())).transpose();
        Ok(Segment {
            q: make(wanted.q, Part::Q)?,
            k: make(wanted.k, Part::K)?,
            v: make(wanted.v, Part::V)?,
            grad_o: make(wanted.grad_o, Part::GradO)?,
        })
    }
}
