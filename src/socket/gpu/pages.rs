//! Slabs of pages in GPU buffers.

use crate::engine::gpu::Context;
use crate::error::{Error, Result};
use crate::socket::pages::MAX_SLAB_PAGES;
use crate::socket::plan::Geometry;

pub(crate) type Pool = crate::socket::pages::Pool<Slab>;

/// Buffers of a number of pages.
#[derive(Debug)]
pub(crate) struct Slab {
    pub k: wgpu::Buffer,
    pub v: wgpu::Buffer,
    /// Sign bits, gains and biases: `[page, kv head, word, token]`.
    pub index: wgpu::Buffer,
}

impl Slab {
    /// The buffers beside the bytes one page takes in each.
    pub fn parts(&self, geometry: &Geometry) -> [(&wgpu::Buffer, u64); 3] {
        let [k, v, index] = geometry.page_bytes();
        [(&self.k, k), (&self.v, v), (&self.index, index)]
    }

    /// Pages one slab may have: every buffer of it fits one binding.
    fn limit(ctx: &Context, geometry: &Geometry) -> u64 {
        let largest = geometry.page_bytes().into_iter().max().unwrap_or(1);
        let caps = ctx.caps();
        (caps.max_storage_binding.min(caps.max_buffer) / largest).min(MAX_SLAB_PAGES)
    }

    /// Whether one page fits the device's bindings.
    pub fn check(ctx: &Context, geometry: &Geometry) -> Result<()> {
        if Self::limit(ctx, geometry) == 0 {
            let value = geometry.page_bytes().into_iter().max().unwrap_or(0);
            let limit = ctx.caps().max_storage_binding;
            return Err(Error::Limit { op: "new", what: "bytes of one page", value, limit });
        }
        Ok(())
    }

    fn new(ctx: &Context, op: &'static str, geometry: &Geometry, pages: usize) -> Result<Self> {
        let usage = wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC | wgpu::BufferUsages::COPY_DST;
        let [k, v, index] = geometry.page_bytes().map(|bytes| bytes * pages as u64);
        Ok(Self {
            k: ctx.buffer(op, "keys", k, usage)?,
            v: ctx.buffer(op, "values", v, usage)?,
            index: ctx.buffer(op, "index", index, usage)?,
        })
    }
}

/// Grows until `pages` are free, or not at all.
pub(crate) fn grow(pool: &mut Pool, ctx: &Context, op: &'static str, geometry: &Geometry, pages: usize) -> Result<()> {
    let limit = Slab::limit(ctx, geometry) as usize;
    pool.grow(op, pages, geometry.page, limit, |count| Slab::new(ctx, op, geometry, count))
}

/// Bytes of keys, values and index.
pub(crate) fn bytes(pool: &Pool) -> [u64; 3] {
    pool.slabs.iter().fold([0; 3], |[k, v, i], s| [k + s.k.size(), v + s.v.size(), i + s.index.size()])
}
