//! The last keys and values of sequences, or their gradients, in host memory.

use crate::engine::cpu::memory::zeros;
use crate::error::Result;
use crate::race::config::RaceShape;
use crate::race::window::{RingData, WindowCall, WindowSpec};
use crate::tensor::{DType, Storage, TensorView};
use half::{bf16, f16};

/// Rows in their own dtype.
#[derive(Debug)]
enum Elements {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Bf16(Vec<bf16>),
}

impl Elements {
    fn zeros(op: &'static str, dtype: DType, len: usize) -> Result<Self> {
        Ok(match dtype {
            DType::F16 => Self::F16(zeros(op, len)?),
            DType::Bf16 => Self::Bf16(zeros(op, len)?),
            _ => Self::F32(zeros(op, len)?),
        })
    }

    fn dtype(&self) -> DType {
        match self {
            Self::F32(_) => DType::F32,
            Self::F16(_) => DType::F16,
            Self::Bf16(_) => DType::Bf16,
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::F32(x) => x.len(),
            Self::F16(x) => x.len(),
            Self::Bf16(x) => x.len(),
        }
    }

    fn view(&self, shape: [usize; 4]) -> TensorView<'_> {
        match self {
            Self::F32(x) => TensorView::f32(x, shape),
            Self::F16(x) => TensorView::f16(x, shape),
            Self::Bf16(x) => TensorView::bf16(x, shape),
        }
    }

    fn copy_from(&mut self, other: &Self) {
        match (self, other) {
            (Self::F32(to), Self::F32(from)) => to.copy_from_slice(from),
            (Self::F16(to), Self::F16(from)) => to.copy_from_slice(from),
            (Self::Bf16(to), Self::Bf16(from)) => to.copy_from_slice(from),
            // Both are made with one dtype.
            _ => {}
        }
    }

    /// Copies a row of a host tensor of the same dtype.
    fn put(&mut self, at: usize, from: &TensorView<'_>, row: usize) {
        let dim = from.shape()[3];
        match (self, from.storage()) {
            (Self::F32(to), Storage::F32(from)) => to[at..at + dim].copy_from_slice(&from[row..row + dim]),
            (Self::F16(to), Storage::F16(from)) => to[at..at + dim].copy_from_slice(&from[row..row + dim]),
            (Self::Bf16(to), Storage::Bf16(from)) => to[at..at + dim].copy_from_slice(&from[row..row + dim]),
            // Place and dtype of inputs are checked before anything is done.
            _ => {}
        }
    }

    fn widened(&self) -> Vec<f32> {
        match self {
            Self::F32(x) => x.clone(),
            Self::F16(x) => x.iter().map(|x| x.to_f32()).collect(),
            Self::Bf16(x) => x.iter().map(|x| x.to_f32()).collect(),
        }
    }

    fn fill(&mut self, from: &[f32]) {
        match self {
            Self::F32(to) => to.copy_from_slice(from),
            Self::F16(to) => to.iter_mut().zip(from).for_each(|(to, x)| *to = f16::from_f32(*x)),
            Self::Bf16(to) => to.iter_mut().zip(from).for_each(|(to, x)| *to = bf16::from_f32(*x)),
        }
    }

    /// The rows of a gradient.
    fn sums(&mut self) -> &mut [f32] {
        match self {
            Self::F32(x) => x,
            _ => &mut [],
        }
    }
}

/// Keys `[batch, slot, kv head, head_dim]` and values `[batch, slot, kv head, value_dim]`.
#[derive(Debug)]
pub(crate) struct CpuRing {
    k: Elements,
    v: Elements,
    batch: usize,
    window: usize,
    kv_heads: usize,
    /// Channels of k and of v.
    dims: [usize; 2],
}

impl CpuRing {
    pub fn zeros(op: &'static str, spec: &WindowSpec, batch: usize, gradient: bool) -> Result<Self> {
        let RaceShape { num_kv_heads: kv_heads, head_dim, value_dim, dtype, .. } = spec.shape;
        let dtype = if gradient { DType::F32 } else { dtype };
        let rows = batch.saturating_mul(spec.tokens).saturating_mul(kv_heads);
        let of = |dim| Elements::zeros(op, dtype, rows.saturating_mul(dim));
        Ok(Self {
            k: of(head_dim)?,
            v: of(value_dim)?,
            batch,
            window: spec.tokens,
            kv_heads,
            dims: [head_dim, value_dim],
        })
    }

    pub fn copy(&self, op: &'static str) -> Result<Self> {
        let mut k = Elements::zeros(op, self.k.dtype(), self.k.len())?;
        let mut v = Elements::zeros(op, self.v.dtype(), self.v.len())?;
        k.copy_from(&self.k);
        v.copy_from(&self.v);
        Ok(Self { k, v, ..*self })
    }

    pub fn bytes(&self) -> u64 {
        [&self.k, &self.v].iter().map(|x| (x.len() * x.dtype().size()) as u64).sum()
    }

    pub fn views(&self) -> [TensorView<'_>; 2] {
        let shape = |dim| [self.batch, self.window, self.kv_heads, dim];
        [self.k.view(shape(self.dims[0])), self.v.view(shape(self.dims[1]))]
    }

    /// First elements of a row of k and of v.
    fn at(&self, [b, slot, kv_head]: [usize; 3]) -> [usize; 2] {
        self.dims.map(|dim| ((b * self.window + slot) * self.kv_heads + kv_head) * dim)
    }

    /// Takes in the last tokens of a call.
    pub fn take_in(&mut self, at: WindowCall<'_>, k: &TensorView<'_>, v: &TensorView<'_>) {
        for (b, &length) in at.call.lengths.iter().enumerate() {
            let start = at.slot(b, self.window);
            for token in length.saturating_sub(self.window)..length {
                for kv_head in 0..self.kv_heads {
                    let [of_k, of_v] = self.at([b, (start + token) % self.window, kv_head]);
                    self.k.put(of_k, k, k.row_offset(b, token, kv_head));
                    self.v.put(of_v, v, v.row_offset(b, token, kv_head));
                }
            }
        }
    }

    /// Hands over what a gradient holds for tokens of a call: of k, then (`true`) of v. What is left is of those before.
    pub fn hand_over(&mut self, at: WindowCall<'_>, mut take: impl FnMut(bool, usize, usize, usize, &[f32])) {
        for (b, &length) in at.call.lengths.iter().enumerate() {
            let start = at.slot(b, self.window);
            for token in length.saturating_sub(self.window)..length {
                for kv_head in 0..self.kv_heads {
                    let places = self.at([b, (start + token) % self.window, kv_head]);
                    for (i, (x, place)) in [&mut self.k, &mut self.v].into_iter().zip(places).enumerate() {
                        if let Some(row) = x.sums().get_mut(place..place + self.dims[i]) {
                            take(i == 1, b, token, kv_head, row);
                            row.fill(0.0);
                        }
                    }
                }
            }
        }
    }

    /// Adds to a row of a gradient.
    pub fn add(&mut self, place: [usize; 3], k: &[f32], v: &[f32]) {
        let places = self.at(place);
        for (i, (x, row)) in [(&mut self.k, k), (&mut self.v, v)].into_iter().enumerate() {
            if let Some(to) = x.sums().get_mut(places[i]..places[i] + self.dims[i]) {
                to.iter_mut().zip(row).for_each(|(to, x)| *to += x);
            }
        }
    }

    pub fn export(&self) -> RingData {
        RingData { k: self.k.widened(), v: self.v.widened() }
    }

    pub fn import(op: &'static str, spec: &WindowSpec, data: &RingData, batch: usize, gradient: bool) -> Result<Self> {
        let mut ring = Self::zeros(op, spec, batch, gradient)?;
        ring.k.fill(&data.k);
        ring.v.fill(&data.v);
        Ok(ring)
    }
}
