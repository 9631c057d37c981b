//! Pages of tokens in slabs of a GPU's memory: grown without copying, shared between forks, returned when dropped. Which
//! memory a slab is, the executors say.

use crate::error::{Error, Result};
use crate::socket::problem::AppendRow;

/// A page: slab number in the upper 12 bits, place in the slab in the lower 20.
pub(crate) type Page = u32;
const LOCAL_BITS: u32 = 20;
const MAX_SLABS: usize = 1 << 12;
/// Pages of one slab at most.
pub(crate) const MAX_SLAB_PAGES: u64 = (1 << LOCAL_BITS) - 1;

pub(crate) fn slab_of(page: Page) -> usize {
    (page >> LOCAL_BITS) as usize
}

pub(crate) fn local_of(page: Page) -> u32 {
    page & ((1 << LOCAL_BITS) - 1)
}

/// All slabs, and who holds which page.
#[derive(Debug)]
pub(crate) struct Pool<S> {
    pub slabs: Vec<S>,
    /// Holders of each page, by slab.
    holders: Vec<Vec<u32>>,
    free: Vec<Page>,
}

impl<S> Default for Pool<S> {
    fn default() -> Self {
        Self { slabs: Vec::new(), holders: Vec::new(), free: Vec::new() }
    }
}

impl<S> Pool<S> {
    /// Grows until `pages` of `page_tokens` tokens are free, or not at all; a slab has at most `limit` pages, and
    /// `make` allocates one.
    pub fn grow(
        &mut self,
        op: &'static str,
        pages: usize,
        page_tokens: usize,
        limit: usize,
        make: impl Fn(usize) -> Result<S>,
    ) -> Result<()> {
        let before = self.slabs.len();
        if pages.saturating_sub(self.free.len()).div_ceil(limit) > MAX_SLABS - before {
            let what = "tokens to hold";
            let room = (MAX_SLABS as u64) * limit as u64 * page_tokens as u64;
            let value = (pages as u64).saturating_mul(page_tokens as u64);
            return Err(Error::Limit { op, what, value, limit: room });
        }
        while self.free.len() < pages {
            // At least as much again as there is, so that slabs stay few; less where memory is short.
            let missing = pages - self.free.len();
            let held: usize = self.holders.iter().map(Vec::len).sum();
            let wish = missing.max(held).min(limit);
            let smaller = missing.min(limit);
            let made = make(wish).map(|slab| (slab, wish));
            let made = made
                .or_else(|error| if wish > smaller { make(smaller).map(|slab| (slab, smaller)) } else { Err(error) });
            let (slab, count) = match made {
                Ok(made) => made,
                Err(error) => {
                    // What did fit is given back: memory is short, and the caller's other work needs it.
                    self.slabs.truncate(before);
                    self.holders.truncate(before);
                    self.free.retain(|&page| slab_of(page) < before);
                    return Err(error);
                }
            };
            let number = (self.slabs.len() as u32) << LOCAL_BITS;
            self.holders.push(vec![0; count]);
            self.free.splice(0..0, (0..count as u32).rev().map(|local| number | local));
            self.slabs.push(slab);
        }
        Ok(())
    }

    /// Takes a free page for one holder; [`Pool::grow`] has made sure of it.
    pub fn take(&mut self, op: &'static str) -> Result<Page> {
        let page = self.free.pop().ok_or(Error::out_of_memory(op, 0))?;
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

    /// The page that `row` appends to and that other sequences hold too, among the pages of its sequence.
    fn shared_tail(&self, row: &AppendRow, list: &[Page], page: usize) -> Option<Page> {
        let tail = list.get(row.start / page).copied();
        tail.filter(|&tail| !row.start.is_multiple_of(page) && self.is_shared(tail))
    }

    /// Pages of `page` tokens that `rows` need beside those in `lists`, their sequences' pages.
    pub fn wanted<'a>(&self, rows: &[AppendRow], page: usize, lists: impl Fn(usize) -> &'a [Page]) -> usize {
        let of_row = |row: &AppendRow| {
            let list = lists(row.seq);
            let more = (row.start + row.count).div_ceil(page).saturating_sub(list.len());
            more + usize::from(self.shared_tail(row, list, page).is_some())
        };
        rows.iter().map(of_row).sum()
    }

    /// Takes the pages that `rows` need; [`Pool::grow`] has made sure of them.
    pub fn extend<'a>(
        &mut self,
        op: &'static str,
        rows: &[AppendRow],
        page: usize,
        lists: impl Fn(usize) -> &'a [Page],
    ) -> Result<Growth> {
        let mut growth = Growth { lists: Vec::new(), taken: Vec::new(), replaced: Vec::new() };
        for row in rows {
            let mut list = lists(row.seq).to_vec();
            if let Some(tail) = self.shared_tail(row, &list, page) {
                let copy = self.take(op)?;
                growth.taken.push(copy);
                growth.replaced.push((tail, copy));
                list[row.start / page] = copy;
            }
            while list.len() < (row.start + row.count).div_ceil(page) {
                let fresh = self.take(op)?;
                growth.taken.push(fresh);
                list.push(fresh);
            }
            growth.lists.push((row.seq, list));
        }
        Ok(growth)
    }
}

/// Page lists that an append will leave behind once everything else has succeeded.
pub(crate) struct Growth {
    /// By row: the sequence and its pages.
    pub lists: Vec<(usize, Vec<Page>)>,
    pub taken: Vec<Page>,
    /// Shared tail pages, and the pages that replace them and first take their content.
    pub replaced: Vec<(Page, Page)>,
}
