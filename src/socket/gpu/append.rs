//! Appending: pages for the new tokens, copies of shared tails, then storing and hashing.

use super::kernels::Kernel;
use super::params::{Item, Params};
use super::{GpuExecutor, pages};
use crate::engine::Recording;
use crate::engine::gpu::{Bind, Passes, stage, staged_bytes};
use crate::error::Result;
use crate::socket::pages::{Growth, Page, local_of, slab_of};
use crate::socket::plan::{APPEND_TOKENS, STEP_TOKENS};
use crate::socket::problem::AppendRow;
use crate::tensor::TensorView;
use std::collections::BTreeSet;
use std::ops::Range;

/// Tokens of several sequences, with the pages they lie in.
struct Items {
    items: Vec<Item>,
    pages: Vec<Page>,
    slabs: BTreeSet<usize>,
}

impl Items {
    fn new() -> Self {
        Self { items: Vec::new(), pages: Vec::new(), slabs: BTreeSet::new() }
    }

    /// Adds an item whose kernel looks at `tokens` of the sequence.
    fn push(&mut self, item: Item, list: &[Page], tokens: Range<usize>, page: usize) {
        let range = tokens.start / page..tokens.end.div_ceil(page);
        let first_page = range.start as u32;
        self.items.push(Item { first_page, pages_at: self.pages.len() as u32, ..item });
        self.slabs.extend(list[range.clone()].iter().map(|&p| slab_of(p)));
        self.pages.extend_from_slice(&list[range]);
    }
}

impl GpuExecutor {
    pub(super) fn append_rows(
        &mut self,
        rec: Recording<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        rows: &[AppendRow],
    ) -> Result<()> {
        let op = "append";
        self.ctx.check_alive(op)?;
        let growth = self.grow(op, rows)?;
        let ready = self.append_passes(op, k, v, rows, &growth).and_then(Passes::ready);
        if let Err(error) = ready.and_then(|ready| ready.run(&self.ctx, op, rec)) {
            growth.taken.into_iter().for_each(|page| self.pool.release(page));
            return Err(error);
        }
        let changed = !growth.taken.is_empty();
        for (seq, list) in growth.lists {
            self.sequences[seq].pages = list;
        }
        growth.replaced.into_iter().for_each(|(old, _)| self.pool.release(old));
        if changed {
            self.workspace.pages_changed();
        }
        Ok(())
    }

    /// Takes the pages that `rows` need, or none.
    fn grow(&mut self, op: &'static str, rows: &[AppendRow]) -> Result<Growth> {
        let page = self.geometry.page;
        let lists = |seq: usize| self.sequences[seq].pages.as_slice();
        let wanted = self.pool.wanted(rows, page, lists);
        pages::grow(&mut self.pool, &self.ctx, op, &self.geometry, wanted)?;
        self.pool.extend(op, rows, page, lists)
    }

    fn append_passes(
        &self,
        op: &'static str,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        rows: &[AppendRow],
        growth: &Growth,
    ) -> Result<Passes<'_>> {
        let mut passes = Passes::new(&self.ctx, op);
        for &(old, new) in &growth.replaced {
            self.copy_page(&mut passes, old, new);
        }
        let longest = rows.iter().map(|r| r.count).max().unwrap_or(0);
        let limit = self.ctx.caps().max_storage_binding;
        let batch = k.shape()[0];
        let fits = |view| staged_bytes(view, batch, longest) <= limit;
        if longest <= APPEND_TOKENS && fits(k) && fits(v) {
            let all: Vec<_> = (0..rows.len()).map(|i| (i, 0..rows[i].count)).collect();
            self.store(&mut passes, k, v, rows, growth, &all, 0..batch, 0..longest)?;
        } else {
            for (i, row) in rows.iter().enumerate() {
                let mut span = row.count.min(APPEND_TOKENS);
                while span > 1 && (staged_bytes(k, 1, span) > limit || staged_bytes(v, 1, span) > limit) {
                    span = span.div_ceil(2);
                }
                for start in (0..row.count).step_by(span) {
                    let tokens = start..(start + span).min(row.count);
                    let one = [(i, tokens.clone())];
                    self.store(&mut passes, k, v, rows, growth, &one, row.row..row.row + 1, tokens)?;
                }
            }
        }
        self.means(&mut passes, rows, growth)?;
        self.hash(&mut passes, rows, growth)?;
        Ok(passes)
    }

    fn copy_page(&self, passes: &mut Passes<'_>, from: Page, to: Page) {
        let from_parts = self.pool.slabs[slab_of(from)].parts(&self.geometry);
        let to_parts = self.pool.slabs[slab_of(to)].parts(&self.geometry);
        for ((source, bytes), (target, _)) in from_parts.into_iter().zip(to_parts) {
            let at = |page| u64::from(local_of(page)) * bytes;
            if slab_of(from) == slab_of(to) {
                passes.copy_within(source, at(from), at(to), bytes);
            } else {
                passes.copy((source, at(from)), (target, at(to)), bytes);
            }
        }
    }

    #[allow(clippy::too_many_arguments, reason = "one call's inputs, all different")]
    fn store(
        &self,
        passes: &mut Passes<'_>,
        k: &TensorView<'_>,
        v: &TensorView<'_>,
        rows: &[AppendRow],
        growth: &Growth,
        parts: &[(usize, Range<usize>)],
        batch: Range<usize>,
        tokens: Range<usize>,
    ) -> Result<()> {
        let g = &self.geometry;
        let k = stage(&self.ctx, passes.op(), k, batch.clone(), tokens.clone())?;
        let v = stage(&self.ctx, passes.op(), v, batch.clone(), tokens)?;
        let mut items = Items::new();
        for (i, part) in parts {
            let row = &rows[*i];
            let start = row.start + part.start;
            let batch_row = (row.row - batch.start) as u32;
            let item = Item { batch_row, start: start as u32, count: part.len() as u32, ..Default::default() };
            items.push(item, &growth.lists[*i].1, start..start + part.len(), g.page);
        }
        let max_count = parts.iter().map(|(_, part)| part.len()).max().unwrap_or(0);
        let pieces = (g.k_pieces() + g.v_pieces()) * g.num_kv_heads;
        let work = items.items.len() as u64 * max_count as u64 * pieces as u64;
        let item_part = passes.part(&items.items);
        let page_part = passes.part(&items.pages);
        for &slab in &items.slabs {
            let params = Params {
                slab: slab as u32,
                max_count: max_count as u32,
                items: items.items.len() as u32,
                input: k.strides,
                input2: v.strides,
                ..Default::default()
            };
            let s = &self.pool.slabs[slab];
            let binds = vec![
                k.bind.clone(),
                v.bind.clone(),
                item_part.clone(),
                page_part.clone(),
                Bind::from(&s.k),
                Bind::from(&s.v),
                Bind::from(&self.counters),
            ];
            passes.dispatch(self.key(Kernel::StoreKv), params, work.div_ceil(256), binds)?;
        }
        Ok(())
    }

    fn means(&self, passes: &mut Passes<'_>, rows: &[AppendRow], growth: &Growth) -> Result<()> {
        let g = &self.geometry;
        let mut items = Items::new();
        let mut count = 0;
        for (row, (_, list)) in rows.iter().zip(&growth.lists) {
            if let Some(first) = row.freeze_mean {
                count = first;
                let item = Item { slot: self.sequences[row.seq].slot, ..Default::default() };
                items.push(item, list, 0..first, g.page);
            }
        }
        let item_part = passes.part(&items.items);
        let page_part = passes.part(&items.pages);
        for (i, &slab) in items.slabs.iter().enumerate() {
            // `entries` tells all but the first slab to add to what is there.
            let params = Params { slab: slab as u32, max_count: count as u32, entries: i as u32, ..Default::default() };
            let groups = items.items.len() * g.num_kv_heads * g.head_dim;
            let binds = vec![
                item_part.clone(),
                page_part.clone(),
                Bind::from(&self.pool.slabs[slab].k),
                Bind::from(&self.state),
            ];
            passes.dispatch(self.key(Kernel::MeanKeys), params, groups as u64, binds)?;
        }
        Ok(())
    }

    fn hash(&self, passes: &mut Passes<'_>, rows: &[AppendRow], growth: &Growth) -> Result<()> {
        let g = &self.geometry;
        let longest = rows.iter().map(|r| r.hash.len()).max().unwrap_or(0);
        let stepwise = longest <= STEP_TOKENS;
        // Long hashes go in spans, so that one dispatch stays short.
        let spans = longest.div_ceil(APPEND_TOKENS);
        for span in 0..spans {
            let mut items = Items::new();
            let mut extent = 0;
            for (row, (_, list)) in rows.iter().zip(&growth.lists) {
                let start = row.hash.start + span * APPEND_TOKENS;
                let end = row.hash.end.min(start + APPEND_TOKENS);
                if start >= end {
                    continue;
                }
                let slot = self.sequences[row.seq].slot;
                let item = Item { slot, hash_start: start as u32, hash_end: end as u32, ..Default::default() };
                items.push(item, list, start..end, g.page);
                extent = extent.max(if stepwise { end - start } else { end.div_ceil(64) - start / 64 });
            }
            let item_part = passes.part(&items.items);
            let page_part = passes.part(&items.pages);
            let groups = items.items.len() * extent * g.num_kv_heads;
            let kernel = if stepwise { Kernel::HashStep } else { Kernel::HashKeys };
            for &slab in &items.slabs {
                let params = Params {
                    slab: slab as u32,
                    max_count: extent as u32,
                    planes_stride: self.planes_stride,
                    ..Default::default()
                };
                let s = &self.pool.slabs[slab];
                let binds = vec![
                    item_part.clone(),
                    page_part.clone(),
                    Bind::from(&s.k),
                    Bind::from(&s.v),
                    Bind::from(&self.planes),
                    Bind::from(&self.state),
                    Bind::from(&s.index),
                ];
                passes.dispatch(self.key(kernel), params, groups as u64, binds)?;
            }
        }
        Ok(())
    }
}
