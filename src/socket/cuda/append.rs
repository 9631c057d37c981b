//! Appending: pages for the new tokens, copies of shared tails, then storing and hashing.

use super::kernels::Kernel;
use super::params::{Item, NEAR, Numbers, Slot};
use super::plan::{MOST_ROWS, STEP_TOKENS};
use super::{CudaExecutor, pages};
use crate::engine::Recording;
use crate::engine::cuda::{Bind, Grid, Passes, Ready, stage};
use crate::error::Result;
use crate::socket::pages::{Growth, Page};
use crate::socket::problem::AppendRow;
use crate::tensor::TensorView;

impl CudaExecutor {
    pub(super) fn append_rows(
        &mut self,
        rec: &Recording<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        rows: &[AppendRow],
    ) -> Result<()> {
        let op = "append";
        self.ctx.check_alive(op)?;
        rec.only_run(op)?;
        let growth = self.grow(op, rows)?;
        if !growth.taken.is_empty() {
            self.table.changed();
        }
        let ready = self.append_passes(op, k, v, rows, &growth);
        if let Err(error) = ready.and_then(|ready| ready.run(&self.ctx, op)) {
            growth.taken.into_iter().for_each(|page| self.pool.release(page));
            self.table.changed();
            return Err(error);
        }
        for (seq, list) in growth.lists {
            self.sequences[seq].pages = list;
        }
        growth.replaced.into_iter().for_each(|(old, _)| self.pool.release(old));
        self.table.submitted(&self.ctx);
        Ok(())
    }

    /// Takes the pages that `rows` need, or none.
    fn grow(&mut self, op: &'static str, rows: &[AppendRow]) -> Result<Growth> {
        let g = self.sizes.g;
        let lists = |seq: usize| self.sequences[seq].pages.as_slice();
        let wanted = self.pool.wanted(rows, g.page, lists);
        pages::grow(&mut self.pool, &self.ctx, op, &g, wanted)?;
        self.pool.extend(op, rows, g.page, lists)
    }

    fn append_passes(
        &mut self,
        op: &'static str,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        rows: &[AppendRow],
        growth: &Growth,
    ) -> Result<Ready> {
        let ctx = self.ctx.clone();
        let g = self.sizes.g;
        let [batch, tokens, ..] = k.shape();
        let k = stage(&ctx, op, "k", k, 0..batch, 0..tokens)?;
        let v = stage(&ctx, op, "v", v, 0..batch, 0..tokens)?;
        let mut passes = Passes::new(&ctx, op);
        ctx.pin_all(&self.pool.slabs);
        let mut lists: Vec<&[Page]> = self.sequences.iter().map(|s| s.pages.as_slice()).collect();
        for (seq, list) in &growth.lists {
            lists[*seq] = list;
        }
        let table = self.table.update(&mut passes, &ctx, &self.pool, &g, lists.into_iter())?;
        for &(old, new) in &growth.replaced {
            let (from, to) = (pages::place(&self.pool, &g, old), pages::place(&self.pool, &g, new));
            passes.copy(Bind::at(from.0, from.1), Bind::at(to.0, to.1), pages::page_bytes(&g));
        }
        let mut call = self.call(Numbers { k: k.strides, v: v.strides, ..Default::default() }, table);
        call.bind(Slot::K, k.bind);
        call.bind(Slot::V, v.bind);
        let item = |row: &AppendRow| Item {
            batch_row: row.row as u32,
            start: row.start as u32,
            count: row.count as u32,
            slot: self.sequences[row.seq].slot,
            hash_start: row.hash.start as u32,
            hash_end: row.hash.end as u32,
            sequence: row.seq as u32,
            reserved: 0,
        };
        // A grid has so many rows at most.
        for rows in rows.chunks(MOST_ROWS) {
            let longest = |of: fn(&AppendRow) -> usize| rows.iter().map(of).max().unwrap_or(0) as u64;
            let items: Vec<_> = rows.iter().map(item).collect();
            let mut launch = |kernel: Kernel, items: &[Item], [x, y]: [u64; 2], shared: u32, max_count: usize| {
                let mut call = call.clone();
                call.params.numbers.max_count = max_count as u32;
                if items.len() <= NEAR {
                    call.params.items[..items.len()].copy_from_slice(items);
                } else {
                    let part = passes.part(items);
                    call.bind(Slot::Items, part);
                }
                let grid = Grid::xyz([x, y, items.len() as u64], self.key(kernel).threads()).shared(shared);
                // The first of the call waits for all before it.
                let grid = if kernel == Kernel::StoreKv { grid } else { grid.overlap() };
                passes.dispatch(self.key(kernel), call.params, grid, call.binds())
            };
            let heads = g.num_kv_heads as u64;
            let pieces = longest(|r| r.count) * heads * (g.k_pieces() + g.v_pieces()) as u64;
            launch(Kernel::StoreKv, &items, [pieces.div_ceil(256), 1], 0, 0)?;
            let waiting = rows.iter().filter_map(|row| row.freeze_mean.map(|count| (item(row), count)));
            let (means, counts): (Vec<_>, Vec<_>) = waiting.unzip();
            if let Some(&count) = counts.first() {
                launch(Kernel::MeanKeys, &means, [g.head_dim as u64, heads], 0, count)?;
            }
            let hashed = longest(|r| r.hash.len());
            if hashed <= STEP_TOKENS as u64 {
                launch(Kernel::HashStep, &items, [hashed, heads], 0, 0)?;
            } else if let Some(shared) = self.sizes.hash_tiles_shared() {
                let blocks = longest(|r| (r.hash.end - r.hash.start / 64 * 64).div_ceil(128));
                launch(Kernel::HashTiles, &items, [blocks, heads], shared as u32, 0)?;
            } else {
                let blocks = longest(|r| (r.hash.end - r.hash.start / 64 * 64).div_ceil(64));
                launch(Kernel::HashKeys, &items, [blocks, heads], 0, 0)?;
            }
        }
        passes.ready()
    }
}
