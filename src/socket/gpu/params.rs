//! The structs that shaders read, field for field; a test compares the offsets.

use crate::engine::gpu::{GridParams, Strides};
use bytemuck::{Pod, Zeroable};

/// Twin of `Params` in shaders/common/params.wgsl. A kernel reads the fields that concern it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Params {
    /// Workgroups that have work; the folded grid may hold more.
    pub groups: u32,
    /// Workgroups along x of the folded grid.
    pub group_width: u32,
    pub batch: u32,
    /// Query tokens per sequence.
    pub tq: u32,
    /// Page entries to work on.
    pub entries: u32,
    /// First of them.
    pub first_entry: u32,
    pub slab: u32,
    /// Largest count over the items: the grid's extent.
    pub max_count: u32,
    pub scale: f32,
    pub beta: f32,
    /// Elements from one head's planes to the next's; 0 where they share one set.
    pub planes_stride: u32,
    pub items: u32,
    /// First input, in elements: q, or k.
    pub input: Strides,
    /// Second input: v.
    pub input2: Strides,
    pub sink: u32,
    pub window: u32,
    /// Words before the first score: the thresholds.
    pub header: u32,
    /// Entries of a selection row.
    pub width: u32,
    /// First row of the block, whose scratch space starts there.
    pub first_row: u32,
    pub row_shift: u32,
    /// Query tokens of each sequence that the block covers.
    pub tokens: u32,
    /// First of them.
    pub first_token: u32,
}

impl GridParams for Params {
    fn with_grid(self, groups: u32, group_width: u32) -> Self {
        Self { groups, group_width, ..self }
    }
}

/// Twin of `Row` in shaders/common/rows.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Row {
    pub visible: u32,
    pub heavy: u32,
    /// The sequence's place in the state buffer.
    pub slot: u32,
    /// 1 where the keys are not hashed yet.
    pub unindexed: u32,
    /// First score of the row, after the header.
    pub score_base: u32,
    /// First partial result of the row.
    pub part_base: u32,
    /// Partial results per query head.
    pub part_count: u32,
    pub reserved: u32,
}

/// Twin of `Item` in shaders/common/items.wgsl.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Item {
    pub batch_row: u32,
    pub start: u32,
    pub count: u32,
    /// Logical page that `pages_at` speaks of.
    pub first_page: u32,
    pub pages_at: u32,
    pub slot: u32,
    pub hash_start: u32,
    pub hash_end: u32,
}

/// Twin of `Entry` in the scoring and attention shaders: a page of a sequence.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Entry {
    pub sequence: u32,
    /// Its number in the sequence.
    pub logical: u32,
    /// Its number in the slab.
    pub page: u32,
    pub reserved: u32,
}
