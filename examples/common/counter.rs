//! Queries, keys, values and gradients of any length that nobody has to hold: every element is a hash of its place, the
//! same on the CPU and, bit for bit, in a shader.

use half::bf16;
use rayon::prelude::*;
use softhash::{DType, Result, Tensor};
use std::ops::Range;

/// One of the tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Q,
    K,
    V,
    GradO,
}

impl Part {
    /// A power of two, so that scaling is exact: q and k of norm about 0.8 at 128 channels, where tanh is neither flat
    /// nor saturated; v and the gradient of spread 1.2.
    #[inline(always)]
    fn scale(self) -> f32 {
        match self {
            Self::Q | Self::K => 1.0 / 2048.0,
            Self::V | Self::GradO => 1.0 / 128.0,
        }
    }
}

/// The tensors of one sequence.
#[derive(Clone, Copy, Debug)]
pub struct Counter {
    pub seed: u32,
    pub heads: usize,
    pub channels: usize,
    pub dtype: DType,
    /// Token t is as token t mod `period`: a resident piece stands for a long sequence.
    pub period: u64,
}

const GOLDEN: u32 = 0x9e37_79b9;

/// A bijection of 32 bits without visible pattern (lowbias32).
#[inline(always)]
fn mix(mut x: u32) -> u32 {
    x = (x ^ (x >> 16)).wrapping_mul(0x7feb_352d);
    x = (x ^ (x >> 15)).wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// About normal: the sum of four bytes, of mean 0.
#[inline(always)]
fn element(row: u32, channel: u32, scale: f32) -> f32 {
    let x = mix(row.wrapping_add(channel.wrapping_mul(GOLDEN)));
    // Bytes added in pairs; wrapping, for checks would keep the loop from its vectors.
    let pairs = (x & 0x00ff_00ff).wrapping_add((x >> 8) & 0x00ff_00ff);
    let sum = (pairs & 0xffff).wrapping_add(pairs >> 16);
    (sum as i32).wrapping_sub(510) as f32 * scale
}

/// To nearest, ties to even, without the care for NaN that would keep it from vectors.
#[inline(always)]
fn to_bf16(x: f32) -> bf16 {
    let bits = x.to_bits();
    bf16::from_bits((bits.wrapping_add(0x7fff).wrapping_add((bits >> 16) & 1) >> 16) as u16)
}

/// Fills rows with whatever vectors there are: multiplying 32-bit lanes takes more than every x86-64 has.
struct Fill<'a, T, F> {
    counter: &'a Counter,
    part: Part,
    first: u64,
    out: &'a mut [T],
    make: F,
}

impl<T, F: Fn(f32) -> T> pulp::NullaryFnOnce for Fill<'_, T, F> {
    type Output = ();

    // Inlined, it is compiled for those vectors.
    #[inline(always)]
    fn call(self) {
        let Counter { heads, channels, .. } = *self.counter;
        let scale = self.part.scale();
        for (i, out) in self.out.chunks_exact_mut(channels).enumerate() {
            let key = self.counter.row_key(self.part, self.first + (i / heads) as u64, i % heads);
            let mut channel = 0u32;
            for out in out {
                *out = (self.make)(element(key, channel, scale));
                channel = channel.wrapping_add(1);
            }
        }
    }
}

impl Counter {
    #[inline(always)]
    fn base(&self, part: Part) -> u32 {
        mix(self.seed.wrapping_add((part as u32).wrapping_mul(GOLDEN)))
    }

    #[inline(always)]
    fn row_key(&self, part: Part, token: u64, head: usize) -> u32 {
        let token = (token % self.period) as u32;
        mix(mix(self.base(part) ^ token) ^ (head as u32).wrapping_mul(GOLDEN))
    }

    /// `[1, token, heads, channels]` in host memory.
    pub fn tensor(&self, part: Part, tokens: Range<u64>) -> Result<Tensor> {
        let shape = [1, (tokens.end - tokens.start) as usize, self.heads, self.channels];
        match self.dtype {
            DType::Bf16 => Tensor::from_bf16(self.fill(part, tokens, to_bf16), shape),
            _ => Tensor::from_f32(self.fill(part, tokens, |x| x), shape),
        }
    }

    fn fill<T: Copy + Default + Send, F: Fn(f32) -> T + Copy + Sync>(
        &self,
        part: Part,
        tokens: Range<u64>,
        make: F,
    ) -> Vec<T> {
        const TOKENS: usize = 64;
        let row = self.heads * self.channels;
        let mut out = vec![T::default(); (tokens.end - tokens.start) as usize * row];
        let arch = pulp::Arch::new();
        out.par_chunks_mut(TOKENS * row).enumerate().for_each(|(block, out)| {
            let first = tokens.start + (block * TOKENS) as u64;
            arch.dispatch(Fill { counter: self, part, first, out, make });
        });
        out
    }

    /// One row as the tensor holds it.
    #[inline(always)]
    pub fn row(&self, part: Part, token: u64, head: usize, out: &mut [f64]) {
        let (key, scale) = (self.row_key(part, token, head), part.scale());
        for (channel, out) in out.iter_mut().enumerate() {
            let x = element(key, channel as u32, scale);
            *out = f64::from(if self.dtype == DType::Bf16 { to_bf16(x).to_f32() } else { x });
        }
    }

    /// What shaders take: base, first token, heads, channels, period, bits of the scale, whether bf16.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub fn shader_words(&self, part: Part, first: u64) -> [u32; 7] {
        let (heads, channels) = (self.heads as u32, self.channels as u32);
        let period = u32::try_from(self.period).unwrap_or(u32::MAX);
        let first = (first % self.period) as u32;
        let bf16 = u32::from(self.dtype == DType::Bf16);
        [self.base(part), first, heads, channels, period, part.scale().to_bits(), bf16]
    }
}
