//! Pages of tokens, shared between sequences until one of them writes.

use crate::engine::cpu::memory::Buffer;
use crate::engine::cpu::simd::{Element, padded};
use crate::error::Result;
use crate::socket::problem::CacheSpec;
use std::ops::Range;
use std::sync::Arc;

/// Sizes that every page shares. Rows of K and V are padded with zeros to whole vectors.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    pub kv_heads: usize,
    pub group: usize,
    pub head_dim: usize,
    pub value_dim: usize,
    /// Padded `head_dim`.
    pub dk: usize,
    /// Padded `value_dim`.
    pub dv: usize,
    pub page_tokens: usize,
    pub words: usize,
    pub gain: bool,
    pub bias: bool,
}

impl Geometry {
    pub fn new(spec: &CacheSpec) -> Self {
        let (shape, scalars) = (spec.shape, spec.config.scalars());
        Self {
            kv_heads: shape.num_kv_heads,
            group: shape.group(),
            head_dim: shape.head_dim,
            value_dim: shape.value_dim,
            dk: padded(shape.head_dim),
            dv: padded(shape.value_dim),
            page_tokens: spec.page_tokens,
            words: spec.config.layout().words(),
            gain: scalars.gain,
            bias: scalars.bias,
        }
    }

    pub fn pages(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }

    /// The part of `tokens` that lies in page `page`, counted from the page's start.
    pub fn within(&self, page: usize, tokens: &Range<usize>) -> Range<usize> {
        let start = page * self.page_tokens;
        let clamp = |t: usize| t.clamp(start, start + self.page_tokens) - start;
        clamp(tokens.start)..clamp(tokens.end)
    }
}

/// `page_tokens` tokens of all kv heads.
#[derive(Clone, Debug)]
pub(crate) struct Page {
    /// `[kv_head][token][dk]`.
    pub k: Buffer,
    /// `[kv_head][token][dv]`.
    pub v: Buffer,
    /// `[kv_head][word][token]`, the order in which the scan reads.
    pub bits: Buffer,
    /// `[kv_head][token]`, or nothing.
    pub gain: Buffer,
    /// As `gain`.
    pub bias: Buffer,
}

impl Page {
    pub fn new<E: Element>(op: &'static str, g: &Geometry) -> Result<Self> {
        let tokens = g.kv_heads * g.page_tokens;
        // What does not fit an address saturates, and is refused as memory that is not there.
        let of = |width: usize| tokens.saturating_mul(width);
        Ok(Self {
            k: Buffer::zeroed::<E>(op, of(g.dk))?,
            v: Buffer::zeroed::<E>(op, of(g.dv))?,
            bits: Buffer::zeroed::<u32>(op, of(g.words))?,
            gain: Buffer::zeroed::<f32>(op, if g.gain { tokens } else { 0 })?,
            bias: Buffer::zeroed::<f32>(op, if g.bias { tokens } else { 0 })?,
        })
    }

    /// A page of its own with the first `used` tokens of this one.
    fn copy<E: Element>(&self, op: &'static str, g: &Geometry, used: usize) -> Result<Self> {
        let mut new = Self::new::<E>(op, g)?;
        copy_heads::<E>(&self.k, &mut new.k, g.page_tokens * g.dk, used * g.dk);
        copy_heads::<E>(&self.v, &mut new.v, g.page_tokens * g.dv, used * g.dv);
        copy_heads::<u32>(&self.bits, &mut new.bits, g.page_tokens, used);
        copy_heads::<f32>(&self.gain, &mut new.gain, g.page_tokens, used);
        copy_heads::<f32>(&self.bias, &mut new.bias, g.page_tokens, used);
        Ok(new)
    }

    pub fn k<E: Element>(&self, g: &Geometry, head: usize) -> &[E] {
        &self.k.slice()[head * g.page_tokens * g.dk..][..g.page_tokens * g.dk]
    }

    pub fn v<E: Element>(&self, g: &Geometry, head: usize) -> &[E] {
        &self.v.slice()[head * g.page_tokens * g.dv..][..g.page_tokens * g.dv]
    }

    pub fn bits(&self, g: &Geometry, head: usize) -> &[u32] {
        &self.bits.slice()[head * g.page_tokens * g.words..][..g.page_tokens * g.words]
    }

    pub fn gain(&self, g: &Geometry, head: usize) -> Option<&[f32]> {
        g.gain.then(|| &self.gain.slice()[head * g.page_tokens..][..g.page_tokens])
    }

    pub fn bias(&self, g: &Geometry, head: usize) -> Option<&[f32]> {
        g.bias.then(|| &self.bias.slice()[head * g.page_tokens..][..g.page_tokens])
    }
}

/// Copies the first `used` elements of each run of `run`.
fn copy_heads<T: bytemuck::Pod>(from: &Buffer, to: &mut Buffer, run: usize, used: usize) {
    for (to, from) in to.slice_mut::<T>().chunks_mut(run).zip(from.slice::<T>().chunks(run)) {
        to[..used].copy_from_slice(&from[..used]);
    }
}

/// One sequence: pages, of which the last ones may be room that was reserved, and the frozen mean of its first keys.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sequence {
    pub pages: Vec<Arc<Page>>,
    /// `[kv_head][dk]`.
    pub mean: Option<Arc<[f32]>>,
}

/// Pages to put in place of those from `first` on: those that must be copied because others share them, and new ones.
#[derive(Debug)]
pub(crate) struct Growth {
    replaced: Vec<(usize, Arc<Page>)>,
    added: Vec<Arc<Page>>,
}

impl Sequence {
    /// Allocates what writing to `tokens` takes when `len` tokens are held, without changing anything yet.
    pub fn grow<E: Element>(&self, op: &'static str, g: &Geometry, len: usize, tokens: Range<usize>) -> Result<Growth> {
        let last = g.pages(tokens.end);
        let mut growth = Growth { replaced: Vec::new(), added: Vec::new() };
        for index in tokens.start / g.page_tokens..last {
            match self.pages.get(index) {
                Some(page) if Arc::strong_count(page) == 1 => {}
                Some(page) => {
                    let used = g.within(index, &(0..len)).end;
                    growth.replaced.push((index, Arc::new(page.copy::<E>(op, g, used)?)));
                }
                None => growth.added.push(Arc::new(Page::new::<E>(op, g)?)),
            }
        }
        Ok(growth)
    }

    pub fn apply(&mut self, growth: Growth) {
        for (index, page) in growth.replaced {
            self.pages[index] = page;
        }
        self.pages.extend(growth.added);
    }
}
