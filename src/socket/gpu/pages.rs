//! Pages of tokens in slabs of GPU memory: grown without copying, shared between forks, returned when dropped.

use crate::engine::gpu::Context;
use crate::error::{Error, Result};
use crate::socket::plan::Geometry;

/// A page: slab number in the upper 12 bits, place in the slab in the lower 20.
pub(crate) type Page = u32;
const LOCAL_BITS: u32 = 20;
const MAX_SLABS: usize = 1 << 12;

pub(crate) fn slab_of(page: Page) -> usize {
    (page >> LOCAL_BITS) as usize
}

pub(crate) fn local_of(page: Page) -> u32 {
    page & ((1 << LOCAL_BITS) - 1)
}

/// Buffers of a number of pages.
#[derive(Debug)]
pub(crate) struct Slab {
    pub k: wgpu::Buffer,
    pub v: wgpu::Buffer,
    /// Sign bits, gains and biases: `[page, kv head, word, token]`.
    pub index: wgpu::Buffer,
    pages: usize,
}

impl Slab {
    /// The buffers beside the bytes one page takes in each.
    pub fn parts(&self, geometry: &Geometry) -> [(&wgpu::Buffer, u64); 3] {
        let [k, v, index] = geometry.page_bytes();
        [(&self.k, k), (&self.v, v), (&self.index, index)]
    }
}

/// All slabs, and who holds which page.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    pub slabs: Vec<Slab>,
    /// Holders of each page, by slab.
    holders: Vec<Vec<u32>>,
    free: Vec<Page>,
}

impl Pool {
    /// Pages one slab may have: every buffer of it fits one binding.
    fn slab_limit(ctx: &Context, geometry: &Geometry) -> u64 {
        let largest = geometry.page_bytes().into_iter().max().unwrap_or(1);
        let caps = ctx.caps();
        (caps.max_storage_binding.min(caps.max_buffer) / largest).min((1 << LOCAL_BITS) - 1)
    }

    /// Whether one page fits the device's bindings.
    pub fn check(ctx: &Context, geometry: &Geometry) -> Result<()> {
        if Self::slab_limit(ctx, geometry) == 0 {
            let value = geometry.page_bytes().into_iter().max().unwrap_or(0);
            let limit = ctx.caps().max_storage_binding;
            return Err(Error::Limit { op: "new", what: "bytes of one page", value, limit });
        }
        Ok(())
    }

    /// Grows until `pages` are free, or not at all.
    pub fn grow(&mut self, ctx: &Context, op: &'static str, geometry: &Geometry, pages: usize) -> Result<()> {
        let limit = Self::slab_limit(ctx, geometry) as usize;
        let before = self.slabs.len();
        if pages.saturating_sub(self.free.len()).div_ceil(limit) > MAX_SLABS - before {
            let what = "tokens to hold";
            let room = (MAX_SLABS as u64) * limit as u64 * geometry.page as u64;
            let value = (pages as u64).saturating_mul(geometry.page as u64);
            return Err(Error::Limit { op, what, value, limit: room });
        }
        while self.free.len() < pages {
            // At least as much again as there is, so that slabs stay few; less where memory is short.
            let missing = pages - self.free.len();
            let held: usize = self.slabs.iter().map(|s| s.pages).sum();
            let wish = missing.max(held).min(limit);
            let slab = Self::slab(ctx, op, geometry, wish)
                .or_else(|error| if wish > missing { Self::slab(ctx, op, geometry, missing) } else { Err(error) });
            let slab = match slab {
                Ok(slab) => slab,
                Err(error) => {
                    // What did fit is given back: memory is short, and the caller's other work needs it.
                    self.slabs.truncate(before);
                    self.holders.truncate(before);
                    self.free.retain(|&page| slab_of(page) < before);
                    return Err(error);
                }
            };
            let number = (self.slabs.len() as u32) << LOCAL_BITS;
            self.holders.push(vec![0; slab.pages]);
            self.free.splice(0..0, (0..slab.pages as u32).rev().map(|local| number | local));
            self.slabs.push(slab);
        }
        Ok(())
    }

    fn slab(ctx: &Context, op: &'static str, geometry: &Geometry, pages: usize) -> Result<Slab> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let [k, v, index] = geometry.page_bytes().map(|bytes| bytes * pages as u64);
        Ok(Slab {
            k: ctx.buffer(op, "keys", k, usage)?,
            v: ctx.buffer(op, "values", v, usage)?,
            index: ctx.buffer(op, "index", index, usage)?,
            pages,
        })
    }

    /// Takes a free page for one holder; [`Pool::grow`] has made sure of it.
    pub fn take(&mut self, op: &'static str) -> Result<Page> {
        let page = self.free.pop().ok_or(Error::OutOfMemory { op, bytes: 0 })?;
        self.holders[slab_of(page)][local_of(page) as usize] = 1;
        Ok(page)
    }

    pub fn share(&mut self, page: Page) {
        self.holders[slab_of(page)][local_of(page) as usize] += 1;
    }

    pub fn is_shared(&self, page: Page) -> bool {
        self.holders[slab_of(page)][local_of(page) as usize] > 1
    }

    pub fn release(&mut self, page: Page) {
        let holders = &mut self.holders[slab_of(page)][local_of(page) as usize];
        *holders -= 1;
        if *holders == 0 {
            self.free.push(page);
        }
    }

    /// Bytes of keys, values and index.
    pub fn bytes(&self) -> [u64; 3] {
        self.slabs.iter().fold([0; 3], |[k, v, i], s| [k + s.k.size(), v + s.v.size(), i + s.index.size()])
    }
}
