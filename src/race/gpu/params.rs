//! The struct that shaders read, field for field; a test compares the offsets.

use crate::engine::gpu::{GridParams, Strides};
use bytemuck::{Pod, Zeroable};

/// Twin of `Params` in shaders/race/params.wgsl. A kernel reads the fields that concern it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Params {
    /// Workgroups that have work; the folded grid may hold more.
    pub groups: u32,
    /// Workgroups along x of the folded grid.
    pub group_width: u32,
    /// Sequences of the piece.
    pub batch: u32,
    /// Tokens that the piece has room for.
    pub tokens: u32,
    /// First kv head.
    pub head: u32,
    /// Kv heads.
    pub heads: u32,
    /// Chunks of a unit.
    pub chunks: u32,
    /// Runs of a unit, or one where the state itself is read: matrices at the beginning of their buffer.
    pub slots: u32,
    /// First element of the ensemble's hyperplanes.
    pub planes_at: u32,
    /// Elements from one head's hyperplanes to the next's; 0 where they share one set.
    pub planes_stride: u32,
    /// First element of the queries' t, and of the keys'.
    pub q_at: u32,
    pub k_at: u32,
    /// First input.
    pub input: Strides,
    /// Second input.
    pub input2: Strides,
    /// Third input.
    pub input3: Strides,
    /// First element of the result.
    pub out_at: u32,
    /// Elements from one sequence's result to the next's.
    pub out_batch: u32,
    /// First element of the state of the piece's first sequence, its kv head 0 and the ensemble.
    pub state_at: u32,
    /// What the kernel defines.
    pub flags: u32,
    /// Factor of the result.
    pub scale: f32,
    /// Zero, which no compiler knows.
    pub zero: u32,
    /// First element of the chunks' parts of runs in the buffer of matrices; 0 where there are none.
    pub parts_at: u32,
    pub reserved: u32,
}

impl Params {
    /// Whether rows of the result begin at multiples of four elements, where they have whole fours.
    pub fn out_in_fours(&self) -> bool {
        self.out_at.is_multiple_of(4) && self.out_batch.is_multiple_of(4)
    }
}

impl GridParams for Params {
    fn with_grid(self, groups: u32, group_width: u32) -> Self {
        Self { groups, group_width, ..self }
    }
}
