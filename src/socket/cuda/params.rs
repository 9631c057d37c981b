//! What kernels are given, field for field as in shaders/cuda/common/params.cuh.

use crate::engine::cuda::{Bind, Strides};
use bytemuck::{Pod, Zeroable};

/// Rows and items that travel in the arguments; more come in memory.
pub(crate) const NEAR: usize = 16;

/// Twin of `Row`: one query token of one sequence.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Row {
    pub visible: u32,
    pub heavy: u32,
    pub slot: u32,
    pub unindexed: u32,
    /// In units of 64 scores.
    pub score_base: u32,
    pub part_base: u32,
    pub part_count: u32,
    pub sequence: u32,
}

/// Twin of `Item`: tokens of one sequence to store and hash.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Item {
    pub batch_row: u32,
    pub start: u32,
    pub count: u32,
    pub slot: u32,
    pub hash_start: u32,
    pub hash_end: u32,
    pub sequence: u32,
    pub reserved: u32,
}

/// Twin of `Numbers`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Numbers {
    pub q: Strides,
    pub k: Strides,
    pub v: Strides,
    pub pages_stride: u32,
    pub planes_stride: u32,
    pub tq: u32,
    pub first_row: u32,
    pub sink: u32,
    pub window: u32,
    pub scale: f32,
    pub beta: f32,
    pub span: u32,
    pub width: u32,
    pub items_count: u32,
    pub max_count: u32,
}

/// Twin of `Params`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
pub(crate) struct Params {
    pub numbers: Numbers,
    pub rows: [Row; NEAR],
    pub items: [Item; NEAR],
}

const _: () = assert!(size_of::<Params>() == 120 + 64 * NEAR, "no padding");

/// The pointers after the parameters, in the order of `Call`.
#[derive(Clone, Copy)]
pub(crate) enum Slot {
    Q,
    K,
    V,
    O,
    Lse,
    Pages,
    Rows,
    Items,
    Planes,
    PlaneParts,
    State,
    Tables,
    Scores,
    Histogram,
    Candidates,
    Cuts,
    Partials,
    Arrivals,
    NonFinite,
    Indices,
    Values,
}

/// Parameters and memory of a call, from which each launch takes its arguments.
#[derive(Clone)]
pub(crate) struct Call {
    pub params: Params,
    binds: Vec<Bind>,
}

impl Call {
    pub fn new(numbers: Numbers) -> Self {
        let params = Params { numbers, ..Default::default() };
        Self { params, binds: vec![Bind::null(); Slot::Values as usize + 1] }
    }

    pub fn bind(&mut self, slot: Slot, bind: impl Into<Bind>) {
        self.binds[slot as usize] = bind.into();
    }

    pub fn binds(&self) -> Vec<Bind> {
        self.binds.clone()
    }
}
