//! Slabs of pages in CUDA memory, and the table by which kernels find them.
//!
//! A page is one piece of memory: keys, values, index. The table holds the address of each page of each sequence.

use crate::engine::cuda::{Bind, Buffer, Context, Passes};
use crate::error::{Error, Result};
use crate::socket::pages::{MAX_SLAB_PAGES, Page, local_of, slab_of};
use crate::socket::plan::Geometry;
use std::sync::Arc;

pub(crate) type Pool = crate::socket::pages::Pool<Buffer>;

pub(crate) fn page_bytes(g: &Geometry) -> u64 {
    g.page_bytes().iter().sum()
}

/// Grows until `pages` are free, or not at all.
pub(crate) fn grow(pool: &mut Pool, ctx: &Arc<Context>, op: &'static str, g: &Geometry, pages: usize) -> Result<()> {
    let bytes = page_bytes(g);
    // A slab in pieces of at most an eighth of the memory, so that what is left over is of use.
    let limit = (ctx.caps().memory / 8 / bytes).clamp(1, MAX_SLAB_PAGES) as usize;
    pool.grow(op, pages, g.page, limit, |count| ctx.uninit(op, bytes * count as u64))
}

/// The buffer of a page and its place in it.
pub(crate) fn place<'a>(pool: &'a Pool, g: &Geometry, page: Page) -> (&'a Buffer, u64) {
    (&pool.slabs[slab_of(page)], u64::from(local_of(page)) * page_bytes(g))
}

/// The address of each page, a row of `stride` for each list.
fn addresses<'a>(
    pool: &Pool,
    g: &Geometry,
    lists: impl ExactSizeIterator<Item = &'a [Page]>,
    stride: usize,
) -> Vec<u64> {
    let mut addresses = vec![0u64; lists.len() * stride];
    for (row, list) in addresses.chunks_exact_mut(stride).zip(lists) {
        for (address, &page) in row.iter_mut().zip(list) {
            let (slab, at) = place(pool, g, page);
            *address = slab.pointer() + at;
        }
    }
    addresses
}

/// The table on the device, and whether it says what it should.
#[derive(Default)]
pub(crate) struct Table {
    buffer: Option<Buffer>,
    stride: usize,
    current: bool,
}

impl Table {
    /// The sequences' pages are others now.
    pub fn changed(&mut self) {
        self.current = false;
    }

    /// To be called once the passes that [`Table::update`] was part of are submitted. A graph has a table of its own.
    pub fn submitted(&mut self, ctx: &Context) {
        self.current |= !ctx.is_capturing();
    }

    pub fn bytes(&self) -> u64 {
        self.buffer.as_ref().map_or(0, Buffer::size)
    }

    /// The table for kernels, and its stride; brought up to date by `passes` where it is not, with these lists. A graph
    /// gets one that stays as it is, as later calls and launches come in any order.
    pub fn update<'a>(
        &mut self,
        passes: &mut Passes<'_>,
        ctx: &Arc<Context>,
        pool: &Pool,
        g: &Geometry,
        lists: impl ExactSizeIterator<Item = &'a [Page]> + Clone,
    ) -> Result<(Bind, u32)> {
        let op = passes.op();
        let longest = lists.clone().map(<[Page]>::len).max().unwrap_or(0).max(1);
        if ctx.is_capturing() {
            let table = ctx.constant(op, bytemuck::cast_slice(&addresses(pool, g, lists, longest)))?;
            return Ok((Bind::from(&table), longest as u32));
        }
        let room = |stride: usize| (lists.len().max(1) * stride * 8) as u64;
        let fits =
            self.buffer.as_ref().is_some_and(|buffer| longest <= self.stride && room(self.stride) <= buffer.size());
        if !fits {
            // Room to grow, so that a growing context does not allocate at every page.
            self.stride = longest.next_power_of_two().max(16);
            self.buffer = Some(ctx.uninit(op, room(self.stride).next_power_of_two())?);
            self.current = false;
        }
        let buffer = self.buffer.as_ref().ok_or(Error::out_of_memory(op, room(self.stride)))?;
        if !self.current && lists.len() > 0 {
            let addresses = addresses(pool, g, lists, self.stride);
            let bytes = (addresses.len() * 8) as u64;
            let part = passes.part(&addresses);
            passes.copy(part, Bind::from(buffer), bytes);
        }
        Ok((Bind::from(buffer), self.stride as u32))
    }
}
