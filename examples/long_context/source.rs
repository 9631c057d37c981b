//! The counter's tensors as segments, made where they are needed.

use crate::counter::{Counter, Part};
#[cfg(feature = "cuda")]
use crate::counter_cuda;
#[cfg(feature = "wgpu")]
use crate::counter_gpu;
use softhash::{Device, Segment, SegmentSource, StreamFailure, Tensor, Wanted};
use std::ops::Range;

type Result<T> = std::result::Result<T, StreamFailure>;

/// Who makes the tensors.
enum Maker {
    Host,
    #[cfg(feature = "wgpu")]
    Gpu(counter_gpu::Generator),
    #[cfg(feature = "cuda")]
    Cuda(counter_cuda::Generator),
}

impl Maker {
    #[allow(unused_variables, reason = "the device decides only where there are several")]
    fn new(device: &Device, counter: Counter) -> Result<Self> {
        #[cfg(feature = "cuda")]
        if let Some(generator) = counter_cuda::Generator::new(device, counter)? {
            return Ok(Self::Cuda(generator));
        }
        #[cfg(feature = "wgpu")]
        if let Some(generator) = counter_gpu::Generator::new(device, counter) {
            return Ok(Self::Gpu(generator));
        }
        Ok(Self::Host)
    }
}

pub struct Source {
    counter: Counter,
    tokens: u64,
    maker: Maker,
}

impl Source {
    pub fn new(device: &Device, counter: Counter, tokens: u64) -> Result<Self> {
        Ok(Self { counter, tokens, maker: Maker::new(device, counter)? })
    }

    /// One of the same tensors with buffers of its own.
    pub fn another(&self, device: &Device) -> Result<Self> {
        let maker = match &self.maker {
            #[cfg(feature = "cuda")]
            Maker::Cuda(generator) => Maker::Cuda(generator.another()),
            _ => Maker::new(device, self.counter)?,
        };
        Ok(Self { counter: self.counter, tokens: self.tokens, maker })
    }

    pub fn tensor(&mut self, part: Part, tokens: Range<u64>) -> Result<Tensor> {
        match &mut self.maker {
            Maker::Host => Ok(self.counter.tensor(part, tokens)?),
            #[cfg(feature = "wgpu")]
            Maker::Gpu(generator) => Ok(generator.tensor(part, tokens)?),
            #[cfg(feature = "cuda")]
            Maker::Cuda(generator) => generator.tensor(part, tokens),
        }
    }

    /// The last tokens made on the device are those made on the host, bit for bit.
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
        match &self.maker {
            Maker::Host => 0,
            #[cfg(feature = "wgpu")]
            Maker::Gpu(generator) => generator.bytes(),
            #[cfg(feature = "cuda")]
            Maker::Cuda(generator) => generator.bytes(),
        }
    }
}

impl SegmentSource for Source {
    fn batch(&self) -> usize {
        1
    }

    fn tokens(&self) -> u64 {
        self.tokens
    }

    fn read(&mut self, tokens: Range<u64>, wanted: Wanted) -> Result<Segment> {
        let mut make = |wanted: bool, part| wanted.then(|| self.tensor(part, tokens.clone())).transpose();
        Ok(Segment {
            q: make(wanted.q, Part::Q)?,
            k: make(wanted.k, Part::K)?,
            v: make(wanted.v, Part::V)?,
            grad_o: make(wanted.grad_o, Part::GradO)?,
        })
    }
}
